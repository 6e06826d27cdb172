"""Every backend of the product of few rows against float64 on the host."""

import functools
import inspect
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.dispatch import Gpu, UnsupportedError
from pallas_kernels.few_row_matmul import few_row_matmul, reference, shapes, triton
from pallas_kernels.few_row_matmul.api import BACKENDS
from pallas_kernels.resources import kernel_resources
from pallas_kernels.targets import TARGETS, compile_for, entry_instructions

# (rows, rows of the weight, inner): nothing a multiple of a tile; whole tiles but of rows; whole tiles.
CASES = [
    ((3, 70, 100), np.float32),
    ((3, 70, 100), jnp.float16),
    ((17, 64, 128), jnp.bfloat16),
    ((64, 128, 256), jnp.bfloat16),
]
TINY = {"block_n": 16, "block_k": 32, "splits": 1, "num_warps": 4, "num_stages": 2}


def make_arrays(rng, rows, out, inner, dtype):
    shapes_and_scales = ((rows, inner), 1), ((out, inner), inner**-0.5), ((out,), 1)
    return [jnp.asarray(rng.normal(size=shape) * scale, dtype) for shape, scale in shapes_and_scales]


def float64_activation(name, x):
    half_of_one_plus = {
        "silu": lambda x: 0.5 * np.tanh(x / 2) + 0.5,
        "gelu": np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) + 0.5,
        "quick_gelu": lambda x: 0.5 * np.tanh(1.702 * x / 2) + 0.5,
        "relu": lambda x: x > 0,
        "relu2": lambda x: np.maximum(x, 0),
    }[name]
    return x * half_of_one_plus(x)


def float64_matmul(x, weight, bias=None, activation=None):
    x, weight = (np.asarray(each, np.float64) for each in (x, weight))
    out = x @ weight.T + (0 if bias is None else np.asarray(bias, np.float64))
    if activation is None:
        return out
    gate, up = np.split(out, 2, axis=-1)
    return float64_activation(activation, gate) * up


def plain_product(x, weight):
    """Products of a row added one after another in float32."""
    x, weight = (np.asarray(each, np.float32) for each in (x, weight))
    total = np.zeros((x.shape[0], weight.shape[0]), np.float32)
    for k in range(x.shape[1]):
        total += x[:, k, None] * weight[:, k]
    return total


def plain_matmul(x, weight, bias=None, activation=None):
    """What a model would write, rounded to the dtype of its activations at each step."""
    out = jnp.asarray(plain_product(x, weight), x.dtype)
    if bias is not None:
        out += bias
    if activation is None:
        return out
    gate, up = jnp.split(out, 2, axis=-1)
    return reference.ACTIVATIONS[activation](gate) * up


def rms_error(out, exact):
    return np.sqrt(np.mean((np.asarray(out, np.float64) - exact) ** 2))


run = jax.jit(few_row_matmul, static_argnames=("activation", "partial", "implementation"))


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_product(implementation, dtype, shape, rng):
    """The product, and with bias and activation, are as near to the truth as the plain form in the same precision."""
    x, weight, bias = make_arrays(rng, *shape, dtype)
    for options in ({}, {"bias": bias, "activation": "silu"}):
        out = run(x, weight, implementation=implementation, **options)
        assert (out.shape, out.dtype) == ((shape[0], shape[1] // (2 if options else 1)), dtype)
        exact = float64_matmul(x, weight, **options)
        assert rms_error(out, exact) <= 1.1 * rms_error(plain_matmul(x, weight, **options), exact)


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_parts_add_up(implementation, dtype, rng):
    x, weight, _ = make_arrays(rng, 5, 96, 576, dtype)
    parts = run(x, weight, partial=True, implementation=implementation)
    assert parts.dtype == jnp.float32
    assert parts.shape == (3 if implementation == "triton" else 1, 5, 96)
    exact = float64_matmul(x, weight)
    assert rms_error(parts.sum(0), exact) <= 1.1 * rms_error(plain_product(x, weight), exact)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"])
def test_activations(implementation, activation, rng):
    """Of products that are exact in float32, so that every error is the activation's, as large as its last bits."""
    x, weight, _ = make_arrays(rng, 16, 64, 64, np.float32)
    x, weight = jnp.round(12 * x) / 4, jnp.round(64 * weight) / 64
    out = run(x, weight, activation=activation, implementation=implementation)
    exact = float64_matmul(x, weight, activation=activation)
    assert rms_error(out, exact) <= 1.5 * rms_error(plain_matmul(x, weight, activation=activation), exact)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_activations_of_the_kernel_over_all_magnitudes(name):
    """The kernel has its own, since Triton lacks erf and its tanh differs between versions."""
    x = np.concatenate([np.linspace(-14, 14, 20001), np.geomspace(1e-30, 1e15, 200), -np.geomspace(1e-30, 1e15, 200)])
    x = x.astype(np.float32)
    exact = float64_activation(name, x.astype(np.float64))
    error, plain = (
        np.abs(np.asarray(functions[name](jnp.asarray(x)), np.float64) - exact)
        for functions in (triton.ACTIVATIONS, reference.ACTIVATIONS)
    )
    assert error.max() <= 1.1 * plain.max()
    assert np.sqrt(np.mean(error**2)) <= 1.1 * np.sqrt(np.mean(plain**2))


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 33), st.integers(1, 40), st.integers(1, 130)),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_tiles_of_one_size(shape, splits, seed):
    """Splits need not divide the steps nor steps the inner axis; what is past the end counts for nothing."""
    x, weight, _ = make_arrays(np.random.default_rng(seed), *shape, np.float32)
    matmul = functools.partial(triton.matmul, bias=None, activation=None, config=TINY | {"splits": splits})
    parts = matmul(x, weight, partial=True)
    assert parts.shape == (splits, *shape[:2])
    np.testing.assert_allclose(parts.sum(0), float64_matmul(x, weight), rtol=0, atol=2e-5)


def test_differentiable(rng):
    arrays = make_arrays(rng, 4, 12, 8, np.float32)

    def gated(x, weight, bias):
        gate, up = jnp.split(x @ weight.T + bias, 2, axis=-1)
        return jax.nn.silu(gate) * up

    def op(x, weight, bias):
        return few_row_matmul(x, weight, bias=bias, activation="silu")

    found, expected = (
        jax.jit(jax.grad(lambda *arrays, matmul=matmul: jnp.sum(matmul(*arrays) ** 2), argnums=(0, 1, 2)))(*arrays)
        for matmul in (op, gated)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("model", shapes.MODELS)
def test_sizes_for_real_shapes(model, target):
    gpu = Gpu(target.device_kind, target.capability, target.cores)
    for product in shapes.MODELS[model].values():
        tiles = 1 if product.activation is None else 2
        columns = product.out // tiles
        for rows, dtype in itertools.product((1, 16, 32, 64), (jnp.bfloat16, np.float32)):
            sizes = triton.block_sizes(
                rows, columns, product.inner, gated=tiles == 2, partial=product.partial, dtype=dtype, gpu=gpu
            )
            block_n, block_k, splits = (sizes[name] for name in ("block_n", "block_k", "splits"))
            assert product.inner % (block_k * splits) == 0, "no mask along the inner axis, and even splits"
            assert product.partial or splits == 1
            is_filled = splits * -(-columns // block_n) >= triton.FILL * gpu.cores
            assert is_filled or (block_n == 16 and model in ("smollm2-135m", "qwen3-0.6b"))
            ring = sizes["num_stages"] * block_k * (block_n * tiles + max(16, rows))
            assert ring * jnp.dtype(dtype).itemsize <= triton.SHARED


# Every kind of kernel: rows, product, dtype.
COMPILED = {
    "parts of 8B at 1": (1, shapes.MODELS["llama-3.1-8b"]["out"], jnp.bfloat16),
    "parts of 8B at 32": (32, shapes.MODELS["llama-3.1-8b"]["qkv"], jnp.bfloat16),
    "parts of 8B at 64": (64, shapes.MODELS["llama-3.1-8b"]["down"], jnp.bfloat16),
    "gated 8B at 32": (32, shapes.MODELS["llama-3.1-8b"]["gate_up"], jnp.bfloat16),
    "gated 8B at 64": (64, shapes.MODELS["llama-3.1-8b"]["gate_up"], jnp.float16),
    "parts of 135M at 8": (8, shapes.MODELS["smollm2-135m"]["down"], jnp.bfloat16),
    "gated 135M at 64": (64, shapes.MODELS["smollm2-135m"]["gate_up"], jnp.bfloat16),
    "whole, odd": (33, shapes.Product(1002, 1096, "gelu", partial=False), jnp.bfloat16),
    "float32": (32, shapes.MODELS["smollm2-135m"]["qkv"], np.float32),
    "gated float32": (64, shapes.MODELS["smollm2-135m"]["gate_up"], np.float32),
}


@pytest.mark.parametrize("target", ["a100", "l4", "h200", "b200"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled(gpu_compiler, case, target):
    """Nothing spilled, on the tensor cores, and as much shared memory as `block_sizes` meant to take."""
    rows, product, dtype = COMPILED[case]
    arrays = [jax.ShapeDtypeStruct((size, product.inner), dtype) for size in (rows, product.out)]
    matmul = functools.partial(few_row_matmul, activation=product.activation, partial=product.partial)
    ((name, needs),) = kernel_resources(matmul, *arrays, target=target).items()
    assert name == triton.OP
    assert needs.spill_bytes == 0
    assert bool(needs.tensor_core_instructions.total()) == (dtype != np.float32)
    assert needs.shared_memory <= triton.SHARED + 64


def test_one_launch(gpu_compiler):
    """Activation and bias are in the kernel, and a larger batch is left to XLA."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 4096), (2048, 4096), (2048,))]

    def matmul(x, weight, bias):
        return few_row_matmul(x, weight, bias=bias, activation="silu")

    launches = [each for each in entry_instructions(compile_for(matmul, *arrays)) if each.opcode != "parameter"]
    assert [each.opcode for each in launches] == ["custom-call"]
    larger = compile_for(matmul, jax.ShapeDtypeStruct((65, 4096), jnp.bfloat16), *arrays[1:])
    assert triton.OP not in {each.name.split(".")[0] for each in entry_instructions(larger)}


def test_refusals(rng):
    matmul = inspect.unwrap(few_row_matmul)  # as users have it: without the tests' own shape checks
    x, weight, bias = make_arrays(rng, 4, 6, 8, np.float32)
    for arrays, options, message in (
        ((x[0], weight), {}, r"must be \[T, D\] and \[O, D\]"),
        ((x[:, :5], weight), {}, r"x \(4, 5\) and weight \(6, 8\)"),
        ((x.astype(jnp.int32), weight), {}, "x is int32"),
        ((x, weight.astype(jnp.int8)), {}, "weight is int8"),
        ((x, weight), {"bias": bias[:3]}, "each of the 6 rows"),
        (
            (x, weight),
            {"activation": "swish"},
            "activation='swish' is unknown; there are .*'quick_gelu', 'relu', 'relu2', 'silu'",
        ),
        ((x, weight[:5]), {"activation": "silu"}, "has an odd number"),
        ((x, weight), {"partial": True, "bias": bias}, "partial sums take no activation and no bias"),
        ((x, weight), {"partial": True, "activation": "silu"}, "partial sums take no activation and no bias"),
        ((x, weight), {"implementation": "cuda"}, "'cuda' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul(*arrays, **options)


def test_what_the_kernel_leaves_to_xla(rng):
    x, weight, _ = make_arrays(rng, 65, 6, 8, np.float32)
    for arrays, message in (
        ((x, weight), "x has 65 rows; the kernel is for 1 to 64"),
        ((x[:0], weight), "x has 0 rows"),
        ((x[:2], weight.astype(jnp.bfloat16)), "x is float32 and the weight bfloat16"),
        ((x[:2], weight[:0]), r"weight \(0, 8\) is empty"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            few_row_matmul(*arrays, implementation="triton")
        assert few_row_matmul(*arrays).shape == (arrays[0].shape[0], arrays[1].shape[0])
    large = jax.ShapeDtypeStruct((2**19, 2**12 + 8), jnp.bfloat16)
    assert triton.refusals(jax.ShapeDtypeStruct((1, large.shape[1]), large.dtype), large, None) == [
        "weight (524288, 4104) has more elements than 32-bit offsets reach"
    ]
