"""The product with experts' weights in few bits against what they stand for, expert by expert in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.grouped_matmul import QuantizedExperts, grouped_matmul, plan_experts, shapes, triton
from pallas_kernels.quantized_matmul import ELEMENTS, Format, to_tiles
from pallas_kernels.resources import kernel_resources

INT4 = Format("int4", 32, zero=8)


def nibbles(values):
    """Codes of packed rows: byte `j` of 16 holds those of weights `j` and `j + 16`."""
    runs = np.asarray(values).reshape(*values.shape[:-1], -1, 16)
    return np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def numbers(values, element):
    """What codes stand for, by loops over their bits."""
    if element in ("int8", "e4m3"):
        return np.asarray(values, np.float64)
    codes = nibbles(values)
    if element == "int4":
        return codes.astype(np.float64)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # e2m1, as OCP's microscaling formats list it
    return np.array(table + [-each for each in table])[codes]


def experts_of(rng, shape, format, scale_dtype=np.float32, zeros=None, minimums=False, tensor_scale=False):
    """Random weights in rows, and `[E, O, K]` in float64 that they stand for."""
    count, out, inner = shape
    element = ELEMENTS[format.element]
    if format.element == "e4m3":
        values = jnp.asarray(rng.normal(size=shape), element.dtype)
    else:
        packed = (count, out, inner * element.bits // 8)
        values = jnp.asarray(rng.integers(-128, 128, packed).astype(np.int8).view(np.dtype(element.dtype)))
    small = (count, *format.scales_shape(out, inner))
    if scale_dtype == np.uint8:
        scales = jnp.asarray(rng.integers(118, 122, small), jnp.uint8)
        plain = 2.0 ** (np.asarray(scales, np.float64) - 127)
    else:
        scales = jnp.asarray(rng.uniform(0.01, 0.03, small), scale_dtype)
        plain = np.asarray(scales, np.float64)
    parts = [
        None if zeros is None else jnp.asarray(rng.integers(0, 15, small), zeros),
        jnp.asarray(rng.normal(size=small) / 10, scale_dtype) if minimums else None,
    ]
    whole = jnp.asarray(rng.uniform(0.5, 2, (count, 1, 1)), jnp.float32) if tensor_scale else None

    def spread(each):
        each = np.repeat(np.asarray(each, np.float64), format.rows or out, axis=1)[:, :out]
        return np.repeat(each, format.group or inner, axis=2)[..., :inner]

    weight = numbers(values, format.element) - format.zero - (0 if parts[0] is None else spread(parts[0]))
    weight = weight * spread(plain) + (0 if parts[1] is None else spread(parts[1]))
    stored = QuantizedExperts(values, scales, parts[0], parts[1], whole, format)
    return stored, weight * (1 if whole is None else np.asarray(whole))


@jax.jit
def tiled(weight):
    parts = weight.values, weight.scales, weight.zeros, weight.minimums
    values, scales, zeros, minimums, format = to_tiles(*parts, format=weight.format)
    return QuantizedExperts(values, scales, zeros, minimums, weight.tensor_scale, format)


# What is stored, shape of the weights, rows of a block.
CASES = {
    "int4 of groups": ((INT4, {"scale_dtype": jnp.bfloat16}), (3, 48, 128), 16),
    "int4 with zeros": ((Format("int4", 64), {"zeros": jnp.uint8}), (2, 40, 128), 32),
    "int4 with minimums": ((Format("int4", 32), {"minimums": True}), (2, 40, 128), 16),
    "mxfp4": ((Format("e2m1", 32), {"scale_dtype": np.uint8}), (4, 40, 192), 64),
    "fp8 of blocks": ((Format("e4m3", 128, rows=32), {"tensor_scale": True}), (2, 80, 256), 16),
    "int8": ((Format("int8"), {}), (2, 40, 64), 128),
}


@functools.partial(jax.jit, static_argnames=("options", "block_rows", "implementation"))
def run(x, weight, chosen, share, options, block_rows, implementation):
    plan = plan_experts(chosen, weight.shape[0], block_rows=block_rows, implementation="xla")
    return grouped_matmul(x, weight, plan, gather=True, scale=share, implementation=implementation, **dict(options))


def exact_pairs(x, weight, chosen, share, gated):
    """The result of each pair, one after the other."""
    pairs = []
    for row, experts, weights in zip(np.asarray(x, np.float64), chosen, share, strict=True):
        for e, factor in zip(experts, weights, strict=True):
            out = weight[e] @ row
            if gated:
                gate, up = np.split(out, 2)
                out = gate / (1 + np.exp(-gate)) * up
            pairs.append(factor * out)
    return np.array(pairs)


@pytest.mark.parametrize("case", CASES)
def test_product(case, rng):
    """The kernel and the plain form are as near to the truth as weights that are rounded to bfloat16."""
    (format, options), shape, block_rows = CASES[case]
    stored, weight = experts_of(rng, shape, format, **options)
    chosen = rng.integers(0, shape[0], (21, 2))
    x = jnp.asarray(rng.normal(size=(21, shape[2])), jnp.bfloat16)
    share = jnp.asarray(rng.random((21, 2)), jnp.float32)
    gated = case != "mxfp4"
    given = (("activation", "silu" if gated else None), ("dtype", jnp.float32))
    exact = exact_pairs(x, weight, chosen, np.asarray(share), gated)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    rounded = exact_pairs(x, np.asarray(weight, jnp.bfloat16).astype(np.float64), chosen, np.asarray(share), gated)
    allowed = 1.5 * np.sqrt(np.mean((rounded - exact) ** 2)) + 1e-5 * np.abs(exact).max()
    for implementation, each in (("xla", stored), ("triton", tiled(stored))):
        if implementation == "xla" and case not in ("int4 with zeros", "fp8 of blocks"):
            continue
        out = run(x, each, jnp.asarray(chosen, jnp.int32), share, given, block_rows, implementation)
        assert np.sqrt(np.mean((np.asarray(out) - exact[order]) ** 2)) <= allowed


def test_rows_are_left_to_xla(rng):
    """The kernel wants tiles, and 16-bit rows; the plain form takes anything."""
    stored, weight = experts_of(rng, (2, 16, 64), INT4)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    plan = plan_experts(jnp.asarray([[0], [1], [0]], jnp.int32), 2)
    out = grouped_matmul(x, stored, plan, gather=True, scatter=True)
    np.testing.assert_allclose(out[0, 1], weight[1] @ np.asarray(x[1], np.float64), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="in rows; lay them out with to_tiles, once; x is float32"):
        grouped_matmul(x, stored, plan, gather=True, implementation="triton")


def structs(shape, format, scale_dtype=jnp.float16, zeros=None, minimums=False):
    count, out, inner = shape
    element, struct = ELEMENTS[format.element], jax.ShapeDtypeStruct
    small = (count, *format.scales_shape(out, inner))
    values = struct((count, out, inner * element.bits // 8), element.dtype)
    parts = None if zeros is None else struct(small, zeros), struct(small, scale_dtype) if minimums else None
    return jax.eval_shape(tiled, QuantizedExperts(values, struct(small, scale_dtype), parts[0], parts[1], None, format))


INT4_128 = Format("int4", 128, zero=8), {}
COMPILED = {
    "int4 at 32": ("qwen3-30b-a3b", 32, INT4_128, "h200"),
    "int4 at 2048": ("mixtral-8x7b", 2048, INT4_128, "h200"),
    "mxfp4 at 32": ("gpt-oss-20b", 32, (Format("e2m1", 32), {"scale_dtype": jnp.uint8}), "h200"),
    "int4 with minimums at 2048, older": ("mixtral-8x7b", 2048, (Format("int4", 32), {"minimums": True}), "a100"),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled(gpu_compiler, case):
    """Nothing spilled, and on the tensor cores."""
    model, tokens, (format, options), target = COMPILED[case]
    mixture = shapes.MODELS[model]

    def run(x, weight, chosen):
        plan = plan_experts(chosen, mixture.count)
        return grouped_matmul(x, weight, plan, gather=True, activation=mixture.activation)

    out, inner = mixture.products()["gate_up"]
    weight = structs((mixture.count, out, inner), format, **options)
    arrays = (
        jax.ShapeDtypeStruct((tokens, inner), jnp.bfloat16),
        weight,
        jax.ShapeDtypeStruct((tokens, mixture.per_token), jnp.int32),
    )
    needs = kernel_resources(run, *arrays, target=target)[triton.OP]
    assert needs.spill_bytes == 0
    assert sum(needs.tensor_core_instructions.values())
