"""Every backend of residual and norm against float64 on the host."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_rms_norm import add_rms_norm, shapes, triton
from pallas_kernels.add_rms_norm.api import BACKENDS
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.resources import kernel_resources
from pallas_kernels.targets import compile_for, entry_instructions

EPS = 1e-5
# (rows, width, parts of the update; none where it has the shape of x; no update): masked widths and whole ones.
CASES = [((5, 576), 3), ((1, 1024), 8), ((7, 257), None), ((4, 2880), 0)]


def make_arrays(rng, shape, parts, dtype):
    x = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    scale = jnp.asarray(1 + 0.1 * rng.normal(size=shape[-1]), dtype)
    if parts == 0:
        return x, None, scale
    if parts is None:
        return x, jnp.asarray(rng.normal(size=shape), dtype), scale
    return x, jnp.asarray(rng.normal(size=(parts, *shape)), jnp.float32), scale


def float64_add(x, update):
    x = np.asarray(x, np.float64)
    return x if update is None else x + np.asarray(update, np.float64).reshape(-1, *x.shape).sum(0)


def float64_norm(x, scale):
    x, scale = (np.asarray(each, np.float64) for each in (x, scale))
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


@jax.jit
def plain(x, update, scale):
    """What transformers does: the sum in the dtype of `x`, the norm rounded before its scale."""
    if update is not None:
        x = x + update.reshape(-1, *x.shape).sum(0).astype(x.dtype)
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    return x, scale * wide.astype(x.dtype)


def rms_error(out, exact):
    return np.sqrt(np.mean((np.asarray(out, np.float64) - exact) ** 2))


run = jax.jit(functools.partial(add_rms_norm, eps=EPS), static_argnames="implementation")


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "parts"), CASES)
def test_sum_and_norm(implementation, dtype, shape, parts, rng):
    x, update, scale = make_arrays(rng, shape, parts, dtype)
    total, normed = run(x, update, scale, implementation=implementation)
    assert total.dtype == normed.dtype == dtype
    plain_total, plain_normed = plain(x, update, scale)
    exact = float64_add(x, update)
    assert rms_error(total, exact) <= 1.1 * rms_error(plain_total, exact)
    # Of what was stored, as transformers norms it.
    error = rms_error(normed, float64_norm(total, scale))
    assert error <= 1.1 * rms_error(plain_normed, float64_norm(plain_total, scale))


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("parts", [None, 0, 2])
def test_leading_axes(implementation, parts, rng):
    arrays = make_arrays(rng, (2, 3, 40), parts, np.float32)
    flat = [None if each is None else each.reshape(*each.shape[:-3], -1, 40) for each in arrays[:2]]
    found = run(*arrays, implementation=implementation)
    expected = run(*flat, arrays[2], implementation=implementation)
    for each, other in zip(found, expected, strict=True):
        assert each.shape == (2, 3, 40)
        np.testing.assert_array_equal(each.reshape(6, 40), other)


def test_no_update_passes_x_on(rng):
    x, _, scale = make_arrays(rng, (3, 8), 0, np.float32)
    assert add_rms_norm(x, None, scale, eps=EPS)[0] is x


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_rows_of_zeros(implementation):
    x = jnp.zeros((2, 48), jnp.bfloat16)
    total, normed = run(x, x, jnp.ones(48, jnp.bfloat16), implementation=implementation)
    assert not np.asarray(total).any()
    assert not np.asarray(normed).any()


def test_differentiable(rng):
    arrays = make_arrays(rng, (2, 3, 16), 2, np.float32)

    def loss(function, *arrays):
        total, normed = function(*arrays)
        return (jnp.sin(normed) + total**2).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, function), argnums=(0, 1, 2)))(*arrays)
        for function in (functools.partial(add_rms_norm, eps=EPS), plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_refusals(rng):
    norm = functools.partial(inspect.unwrap(add_rms_norm), eps=EPS)  # without the tests' own shape checks
    x, update, scale = make_arrays(rng, (4, 6), 3, np.float32)
    for arrays, options, message in (
        ((x.astype(jnp.int32), update, scale), {}, "x is int32"),
        ((x, update[:, :3], scale), {}, r"update \(3, 3, 6\) must have the shape of x \(4, 6\)"),
        ((x, update[:0], scale), {}, r"update \(0, 4, 6\)"),
        ((x, update[0, 0], scale), {}, r"update \(6,\)"),
        ((x, update, scale[:5]), {}, r"scale \(5,\) must have one entry for each of the 6 columns"),
        ((x, update, scale), {"implementation": "cuda"}, "'cuda' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(*arrays, **options)


def test_what_the_kernel_leaves_to_xla():
    for shape, message in (((1, 16385), "rows of 16385 are longer than 16384"), ((0, 8), r"x \(0, 8\) is empty")):
        x, scale = jnp.ones(shape), jnp.ones(shape[-1])
        with pytest.raises(UnsupportedError, match=message):
            add_rms_norm(x, x, scale, eps=EPS, implementation="triton")
        assert add_rms_norm(x, x, scale, eps=EPS)[1].shape == shape
    rows, parts = (jax.ShapeDtypeStruct((*lead, 2**19, 2**11), jnp.float32) for lead in ((), (3,)))
    assert triton.refusals(rows, None, None) == []
    assert triton.refusals(rows, parts, None) == ["there are more elements than 32-bit offsets reach"]


@pytest.mark.parametrize("target", ["a100", "l4", "h200", "b200"])
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b", "llama-3.3-70b", "llama-3.1-405b"])
def test_compiled(gpu_compiler, model, target):
    """Nothing spilled, with many parts and with none."""
    width = shapes.WIDTHS[model]
    x = jax.ShapeDtypeStruct((32, width), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((width,), jnp.bfloat16)
    for update in (None, jax.ShapeDtypeStruct((8, 32, width), jnp.float32)):
        found = kernel_resources(functools.partial(add_rms_norm, eps=EPS), x, update, scale, target=target)
        assert list(found) == [triton.OP]
        assert found[triton.OP].spill_bytes == 0


def test_one_launch(gpu_compiler):
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 4096), (4096,)))
    for update in (None, x, jax.ShapeDtypeStruct((4, 32, 4096), jnp.float32)):
        compiled = compile_for(functools.partial(add_rms_norm, eps=EPS), x, update, scale)
        opcodes = [each.opcode for each in entry_instructions(compiled)]
        # Without an update `x` itself is a result, which XLA copies at the end of a program.
        assert opcodes.count("custom-call") == 1
        assert opcodes.count("copy") == (update is None)
        assert not {"fusion", "reduce"} & set(opcodes)
