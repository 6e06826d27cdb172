"""Every backend of residual and norm against float64 on the host."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm, shapes, triton
from pallas_kernels.add_norm.api import BACKENDS
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.resources import kernel_resources, read_resources
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


def float64_norm(x, scale=None, bias=None, kind="rms", offset=0.0):
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    if kind is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * (1 if scale is None else scale + offset) + (0 if bias is None else bias)


def float64_add_norm(
    x, update, scale=None, bias=None, kind="rms", offset=0.0, multiplier=1.0, stored=None, update_kind=None, **weights
):
    """Sum and norm; the norm is of what was `stored`, where that is given."""
    x, update, scale, bias, stored, update_scale, update_bias = (
        None if each is None else np.asarray(each, np.float64)
        for each in (x, update, scale, bias, stored, *map(weights.get, ("update_scale", "update_bias")))
    )
    if update is not None:
        update = update.reshape(-1, *x.shape).sum(0)
        x = x + multiplier * float64_norm(update, update_scale, update_bias, update_kind, offset)
    return x, float64_norm(x if stored is None else stored, scale, bias, kind, offset)


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


STATIC = ("kind", "update_kind", "offset", "multiplier", "implementation")
run = jax.jit(functools.partial(add_norm, eps=EPS), static_argnames=STATIC)


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "parts"), CASES)
def test_sum_and_norm(implementation, dtype, shape, parts, rng):
    x, update, scale = make_arrays(rng, shape, parts, dtype)
    total, normed = run(x, update, scale, implementation=implementation)
    assert total.dtype == normed.dtype == dtype
    plain_total, plain_normed = plain(x, update, scale)
    exact, exact_normed = float64_add_norm(x, update, scale, stored=total)
    assert rms_error(total, exact) <= 1.1 * rms_error(plain_total, exact)
    # Of what was stored, as transformers norms it.
    plain_exact = float64_add_norm(x, update, scale, stored=plain_total)[1]
    assert rms_error(normed, exact_normed) <= 1.1 * rms_error(plain_normed, plain_exact)


# What models ask for besides a plain RMS norm; "s", "b", "us" and "ub" stand for weights and biases of the two norms.
VARIANTS = {
    "layer (Falcon)": ({"kind": "layer"}, "s b"),
    "bare layer (OLMo)": ({"kind": "layer"}, ""),
    "multiplier (Granite)": ({"multiplier": 0.22}, "s"),
    "norms on both sides (Gemma 2)": ({"offset": 1.0, "update_kind": "rms"}, "s us"),
    "norm of the update alone (OLMo 2)": ({"kind": None, "update_kind": "rms"}, "us"),
    "everything": ({"kind": "layer", "update_kind": "layer", "offset": 1.0, "multiplier": 0.5}, "s b us ub"),
}
NAMES = {"s": "scale", "b": "bias", "us": "update_scale", "ub": "update_bias"}


def variant(name, make):
    """Static options of a variant, and its weights by name, each by `make()`."""
    options, weights = VARIANTS[name]
    return options, {NAMES[each]: make() for each in weights.split()}


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize(("shape", "parts", "dtype"), [((3, 257), 3, np.float32), ((2, 512), None, jnp.bfloat16)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(implementation, shape, parts, dtype, name, rng):
    """Both results are as near to the truth as rounding once allows."""
    x, update, _ = make_arrays(rng, shape, parts, dtype)
    x, update = x + 2, update - 1
    # Stored less one, a weight has more bits than bfloat16 has for the sum.
    options, weights = variant(name, lambda: jnp.asarray(0.1 * rng.normal(size=shape[-1]), dtype))
    results = run(x, update, **weights, **options, implementation=implementation)
    exact = float64_add_norm(x, update, stored=results[0], **weights, **options)
    for found, expected in zip(results, exact, strict=True):
        assert (found.dtype, found.shape) == (dtype, shape)
        rounded = rms_error(jnp.asarray(expected, dtype), expected)
        assert rms_error(found, expected) <= 1.01 * rounded + 3e-7 * rms_error(0, expected)


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_variance_of_what_is_left(implementation, rng):
    """Rows far from zero: the mean of squares less the square of the mean would be wrong in its second digit."""
    x = jnp.asarray(1000 + rng.normal(size=(2, 300)), np.float32)
    normed = run(x, None, kind="layer", implementation=implementation)[1]
    np.testing.assert_allclose(normed, float64_add_norm(x, None, kind="layer")[1], rtol=0, atol=5e-4)


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_no_norm(implementation, rng):
    x, update, _ = make_arrays(rng, (3, 24), 2, np.float32)
    total, same = run(x, update, kind=None, implementation=implementation)
    np.testing.assert_allclose(total, float64_add_norm(x, update)[0], rtol=1e-6)
    np.testing.assert_array_equal(same, total)
    assert all(each is x for each in add_norm(x, None, kind=None, eps=EPS, implementation=implementation))


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
    assert add_norm(x, None, scale, eps=EPS)[0] is x


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_rows_of_zeros(implementation):
    x = jnp.zeros((2, 48), jnp.bfloat16)
    total, normed = run(x, x, jnp.ones(48, jnp.bfloat16), implementation=implementation)
    assert not np.asarray(total).any()
    assert not np.asarray(normed).any()


@pytest.mark.parametrize("name", ["plain", *VARIANTS])
def test_differentiable(name, rng):
    """Slopes along random directions, against differences of the float64 form."""
    x, update, scale = make_arrays(rng, (2, 3, 16), 2, np.float32)
    options, weights = ({}, {"scale": scale})
    if name != "plain":
        options, weights = variant(name, lambda: jnp.asarray(rng.normal(size=16), np.float32))
    arrays = {"x": x, "update": update, **weights}

    def loss(function, xp, arrays):
        total, normed = function(**arrays, **options)
        return (xp.sin(normed) + total**2).sum()

    ours = functools.partial(add_norm, eps=EPS, implementation="xla")
    slopes = jax.jit(jax.grad(functools.partial(loss, ours, jnp)))(arrays)
    for each, slope in slopes.items():
        direction, step = rng.normal(size=slope.shape), 1e-5
        below, above = (
            loss(float64_add_norm, np, arrays | {each: np.asarray(arrays[each], np.float64) + sign * step * direction})
            for sign in (-1, 1)
        )
        size = np.linalg.norm(slope) * np.linalg.norm(direction)
        np.testing.assert_allclose((slope * direction).sum(), (above - below) / (2 * step), rtol=0, atol=1e-5 * size)


def test_refusals(rng):
    norm = functools.partial(inspect.unwrap(add_norm), eps=EPS)  # without the tests' own shape checks
    x, update, scale = make_arrays(rng, (4, 6), 3, np.float32)
    for arrays, options, message in (
        ((x.astype(jnp.int32), update, scale), {}, "x is int32"),
        ((x, update[:, :3], scale), {}, r"update \(3, 3, 6\) must have the shape of x \(4, 6\)"),
        ((x, update[:0], scale), {}, r"update \(0, 4, 6\)"),
        ((x, update[0, 0], scale), {}, r"update \(6,\)"),
        ((x, update, scale[:5]), {}, r"scale \(5,\) must have one entry for each of the 6 columns"),
        ((x, update, scale, scale[:5]), {}, r"bias \(5,\) must have one entry"),
        ((x, update, scale), {"implementation": "cuda"}, "'cuda' is unknown"),
        ((x, update, scale), {"kind": "batch"}, "kind='batch' is unknown; it must be 'rms', 'layer' or None"),
        ((x, update, scale), {"update_kind": "l2"}, "update_kind='l2' is unknown"),
        ((x, None, scale), {"update_kind": "rms"}, "update_kind='rms' is a norm of the update, and there is none"),
        ((x, update, scale), {"kind": None}, "^scale belongs to a norm: give kind"),
        ((x, update, None, scale), {"kind": None}, "^bias belongs to a norm"),
        ((x, update), {"update_scale": scale}, "update_scale belongs to a norm: give update_kind"),
        ((x, update), {"update_bias": scale}, "update_bias belongs to a norm"),
        ((x, update), {"update_kind": "rms", "update_scale": scale[:5]}, r"update_scale \(5,\) must have one"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(*arrays, **options)


def test_what_the_kernel_leaves_to_xla():
    for shape, message in (((1, 16385), "rows of 16385 are longer than 16384"), ((0, 8), r"x \(0, 8\) is empty")):
        x, scale = jnp.ones(shape), jnp.ones(shape[-1])
        with pytest.raises(UnsupportedError, match=message):
            add_norm(x, x, scale, eps=EPS, implementation="triton")
        assert add_norm(x, x, scale, eps=EPS)[1].shape == shape
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
        found = kernel_resources(functools.partial(add_norm, eps=EPS), x, update, scale, target=target)
        assert list(found) == [triton.OP]
        assert found[triton.OP].spill_bytes == 0


@pytest.mark.parametrize("model", ["gpt-oss-20b", "llama-3.1-8b", "llama-3.1-405b"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compiled(gpu_compiler, name, model, tmp_path):
    """One launch, and nothing spilled."""
    width = shapes.WIDTHS[model]
    options, weights = variant(name, lambda: jax.ShapeDtypeStruct((width,), jnp.bfloat16))
    x, update = jax.ShapeDtypeStruct((32, width), jnp.bfloat16), jax.ShapeDtypeStruct((4, 32, width), jnp.float32)

    def op(x, update, weights):
        return add_norm(x, update, **weights, **options, eps=EPS)

    compiled = compile_for(op, x, update, weights, dump_to=tmp_path)
    assert read_resources(compiled, tmp_path)[triton.OP].spill_bytes == 0
    opcodes = [each.opcode for each in entry_instructions(compiled)]
    assert opcodes.count("custom-call") == 1
    assert not {"fusion", "reduce"} & set(opcodes)


def test_one_launch(gpu_compiler):
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 4096), (4096,)))
    for update in (None, x, jax.ShapeDtypeStruct((4, 32, 4096), jnp.float32)):
        compiled = compile_for(functools.partial(add_norm, eps=EPS), x, update, scale)
        opcodes = [each.opcode for each in entry_instructions(compiled)]
        # Without an update `x` itself is a result, which XLA copies at the end of a program.
        assert opcodes.count("custom-call") == 1
        assert opcodes.count("copy") == (update is None)
        assert not {"fusion", "reduce"} & set(opcodes)
