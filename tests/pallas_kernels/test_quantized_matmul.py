"""Every backend of the quantized product against float64 on the host, for every element and layout."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.quantized_matmul import (
    ELEMENTS,
    Format,
    dequantize,
    from_tiles,
    quantized_matmul,
    tile_width,
    tiles,
    to_tiles,
)
from pallas_kernels.quantized_matmul.decode import decode

# One of every element, and every kind of scale, zero point and block: format, dtype of scales, what else, rows of x.
CASES = {
    "int4, groups of 32": (Format("int4", 32, zero=8), np.float16, "", 1),
    "int4, zeros": (Format("int4", 128), jnp.bfloat16, "zeros", 64),
    "int4, floating zeros": (Format("int4", 64), np.float32, "floating zeros", 5),
    "int4, minimums": (Format("int4", 32), np.float16, "minimums", 40),
    "int8, rows": (Format("int8"), np.float32, "", 16),
    "uint8, zeros": (Format("uint8", 64), np.float32, "zeros", 16),
    "e4m3, blocks": (Format("e4m3", 128, rows=128), np.float32, "", 64),
    "e5m2, all": (Format("e5m2", rows=None), np.float32, "", 5),
    "e3m2, rows": (Format("e3m2"), np.float32, "", 5),
    "e2m1, mxfp4": (Format("e2m1", 32), np.uint8, "", 16),
    "e2m1, nvfp4": (Format("e2m1", 16), jnp.float8_e4m3fn, "tensor_scale", 1),
    "nf4": (Format("nf4", 64), jnp.bfloat16, "", 5),
}
SMALL_FLOATS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
# As bitsandbytes has it, without the digits that do not show in float32.
NF4 = np.float32(
    [
        *(-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1),
    ]
)


def all_codes(element):
    """Codes that are numbers."""
    codes = np.arange(2 ** ELEMENTS[element].bits, dtype=np.uint8)
    return codes[np.isfinite(numbers(codes, element))]


def numbers(codes, element):
    if element == "nf4":
        return NF4[codes].astype(np.float64)
    if element in SMALL_FLOATS:
        return codes.view(SMALL_FLOATS[element]).astype(np.float64)
    return (codes.view(np.int8) if element == "int8" else codes).astype(np.float64)


def packed(codes, element):
    """The bytes of rows, one weight after another."""
    bits, (out, inner) = ELEMENTS[element].bits, codes.shape
    if bits == 8:
        return codes.view(ELEMENTS[element].dtype)
    size = 4 * bits  # bytes of 32 weights
    values = np.zeros((out, inner // 32 * size), np.uint8)
    for k in range(inner):
        run, j = divmod(k, 32)
        values[:, run * size + j % 16] |= (codes[:, k] & 15) << (4 * (j // 16))
        if bits == 6:
            values[:, run * size + 16 + j % 8] |= (codes[:, k] >> 4) << (2 * (j // 8))
    return values


def make(rng, case, out, inner):
    """Arguments of the op, and the weight in float64."""
    format, dtype, extra, _ = CASES[case] if isinstance(case, str) else case
    codes = rng.choice(all_codes(format.element), (out, inner))
    shape = format.scales_shape(out, inner)
    if dtype == np.uint8:
        scales = rng.integers(120, 130, shape).astype(np.uint8)
        scale = 2.0 ** (scales.astype(np.float64) - 127)
    else:
        scales = rng.uniform(0.5, 2, shape).astype(dtype)
        scale = scales.astype(np.float64)
    arrays = {"values": packed(codes, format.element), "scales": scales}
    spread = np.ix_(
        np.minimum(np.arange(out) // (format.rows or out), shape[0] - 1), np.arange(inner) // (format.group or inner)
    )
    weight = numbers(codes, format.element) - format.zero
    if "zeros" in extra:
        is_exact = extra == "zeros"
        top = 2**format.bits
        zeros = rng.integers(0, top, shape).astype(np.uint8) if is_exact else np.float32(rng.uniform(0, top, shape))
        arrays["zeros"] = zeros
        weight -= zeros.astype(np.float64)[spread]
    weight *= scale[spread]
    if extra == "minimums":
        arrays["minimums"] = rng.normal(size=shape).astype(dtype)
        weight += arrays["minimums"].astype(np.float64)[spread]
    if extra == "tensor_scale":
        arrays["tensor_scale"] = rng.uniform(0.5, 2, (out, 1)).astype(np.float32)
        weight *= arrays["tensor_scale"]
    return {name: jnp.asarray(array) for name, array in arrays.items()}, weight


def tiled(arrays, format):
    """The same arguments in tiles, with the format."""
    names = ("values", "scales", "zeros", "minimums")
    *found, format = to_tiles(*(arrays.get(name) for name in names), format=format)
    return arrays | {name: array for name, array in zip(names, found, strict=True) if array is not None}, format


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def decode_all(words, *, format, dtype):
    return [decode(words, plane, format, dtype) for plane in range(tiles.planes_of(format))]


def rms(x):
    return np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))


run = jax.jit(quantized_matmul, static_argnames=("format", "activation", "partial", "implementation"))


@pytest.mark.parametrize("case", CASES)
def test_product(case, rng):
    """Each backend is as near to the truth as its arithmetic allows: products of exact numbers, summed in float32."""
    format, *_, rows = CASES[case]
    out, inner = 208, 256
    arrays, weight = make(rng, case, out, inner)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=out), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ weight.T
    for implementation in ("triton", "xla"):
        options, layout = arrays, format
        if implementation == "triton":
            options, layout = tiled(arrays, format)
        parts = run(x, **options, format=layout, partial=True, implementation=implementation)
        assert parts.dtype == jnp.float32 and parts.shape[1:] == exact.shape
        # The kernel rounds the table of nf4, and with many rows weights in short groups, to bfloat16.
        rounds = implementation == "triton" and (format.element == "nf4" or (format.group or out) < 2 * max(16, rows))
        assert rms(np.asarray(parts, np.float64).sum(0) - exact) <= (4e-3 if rounds else 1e-6) * rms(exact)
    if case == "int4, groups of 32":
        options, layout = tiled(arrays, format)
        found = run(x, **options, bias=bias, activation="silu", format=layout, implementation="triton")
        gate, up = np.split(exact + np.asarray(bias, np.float64), 2, axis=-1)
        assert found.dtype == x.dtype
        assert rms(np.asarray(found, np.float64) - gate * (0.5 * np.tanh(gate / 2) + 0.5) * up) <= 4e-3 * rms(gate * up)


@pytest.mark.parametrize("element", ELEMENTS)
def test_layouts_hold_the_same_bits(element, rng):
    """Tiles and back is the identity, tiles have as many bytes, and every code decodes to its number exactly."""
    codes = rng.permutation(np.resize(all_codes(element), 3 * 512)).reshape(3, 512).astype(np.uint8)
    values, format = jnp.asarray(packed(codes, element)), Format(element, 32, zero=8 * (element == "int4"))
    scales = jnp.ones((3, 16), np.float16)
    arrays, layout = tiled({"values": values, "scales": scales}, format)
    assert arrays["values"].nbytes == values.nbytes and layout.shape(arrays["values"]) == (3, 512)
    back, small, *_, rows = from_tiles(arrays["values"], arrays["scales"], format=layout)
    assert rows == format and small.shape == scales.shape
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), np.asarray(values).view(np.uint8))

    number = numbers(codes, element) - format.zero
    np.testing.assert_array_equal(dequantize(**arrays, format=layout), number.astype(np.float32))
    words = tiles.split_words(arrays["values"], layout)
    for dtype in (jnp.bfloat16, jnp.float16):
        planes = decode_all(words, format=layout, dtype=dtype)
        # Unsigned integers have no constant zero point here, and up to 255 they are exact in both.
        np.testing.assert_array_equal(tiles.join_planes(planes), number.astype(dtype))


def test_leading_axes_and_edges(rng):
    """Stacks of weights are laid out as one; blocks may be cut off at both edges of the weight."""
    arrays, weight = make(rng, (Format("e4m3", 128, rows=128), np.float32, "", 1), 200, 192)
    format = Format("e4m3", 128, rows=128)
    assert arrays["scales"].shape == (2, 2)
    stack = {name: jnp.stack([array, array[::-1]]) for name, array in arrays.items() if name == "values"}
    stack["scales"] = jnp.stack([arrays["scales"]] * 2)
    np.testing.assert_allclose(dequantize(**stack, format=format)[0], weight, rtol=1e-6)
    with_tiles, layout = tiled(stack, format)
    assert with_tiles["values"].shape == (2, 3, 200, 32) and with_tiles["scales"].shape == (2, 2, 2)
    np.testing.assert_allclose(dequantize(**with_tiles, format=layout)[0], weight, rtol=1e-6)
    x = jnp.asarray(rng.normal(size=(3, 192)), np.float32)
    for backend in ("xla", "reference"):
        found = quantized_matmul(x, **arrays, format=format, implementation=backend)
        np.testing.assert_allclose(found, np.asarray(x) @ weight.T, rtol=1e-4, atol=1e-2)


def test_large_weights_go_by_blocks(rng):
    """Of 256 rows and what is left, for one row, few and many, `x` having a gradient."""
    arrays, weight = make(rng, "int4, zeros", 600, 128)
    format, *_ = CASES["int4, zeros"]
    for rows in (1, 130):
        x = jnp.asarray(rng.normal(size=(rows, 128)), np.float32)
        found = run(x, **arrays, format=format)
        assert rms(found - np.asarray(x, np.float64) @ weight.T) <= 1e-6 * rms(found)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(quantized_matmul(x, **arrays, format=format))))(x[:2])
    np.testing.assert_allclose(gradient[0], weight.sum(0), rtol=1e-3, atol=1e-2)


def test_which_weights_tile():
    assert [tile_width(Format("int4", 128), inner) for inner in (4096, 576, 96)] == [32, 16, None]
    assert tile_width(Format("e2m1", 16), 4096) == 16, "a plane holds one group"
    assert tile_width(Format("e3m2"), 4096) == 16 and tile_width(Format("e3m2"), 576) is None
    assert tile_width(Format("int8", 48), 96) is None and tile_width(Format("int8"), 96) == 16
    assert [tile_width(Format("int4", 32), 14336, shards) for shards in (8, 16, 64)] == [32, 32, None]
    arrays = jnp.zeros((4, 48), jnp.uint8), jnp.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="rows of 96 in groups of 32 can not be tiled at 4 bits: units of 64"):
        to_tiles(*arrays, format=Format("int4", 32))
    with pytest.raises(ValueError, match="the layout is 'rows', not 'tiles'"):
        from_tiles(*arrays, format=Format("int4", 32))


def test_refusals(rng):
    matmul = inspect.unwrap(quantized_matmul)  # as users have it: without the tests' own shape checks
    format = Format("int4", 32, zero=8)
    arrays, _ = make(rng, "int4, groups of 32", 6, 64)
    values, scales = arrays["values"], arrays["scales"]
    x = jnp.zeros((4, 64), jnp.bfloat16)
    for options, message in (
        ({"values": values[None]}, "must have 2 axes in rows"),
        ({"values": values.astype(jnp.int8)}, "values are int8; int4 in rows is stored in uint8"),
        ({"x": x[:, :32]}, r"x (4, 32) and the weight (6, 64) must be [M, K] and [N, K]"),
        ({"x": x.astype(jnp.int32)}, "x is int32"),
        ({"scales": scales[:, :1]}, "scales (6, 1) must be (6, 2)"),
        ({"zeros": scales.T}, "zeros (2, 6) must be (6, 2)"),
        ({"tensor_scale": jnp.ones(1)}, "tensor_scale (1,) must be (1, 1) or (6, 1)"),
        ({"bias": jnp.zeros(3)}, "each of the 6 rows"),
        ({"activation": "swish"}, "activation='swish' is unknown; there are"),
        ({"values": values[:5], "scales": scales[:5], "activation": "silu"}, "has 5 rows, an odd number"),
        ({"partial": True, "activation": "silu"}, "partial sums take no activation and no bias"),
        ({"implementation": "cuda"}, "'cuda' is unknown"),
        ({"implementation": "triton"}, "the weight is in rows; lay it out with to_tiles"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            matmul(**({"x": x, "values": values, "scales": scales, "format": format} | options))
    for make_format, message in (
        (functools.partial(Format, "int3"), "element 'int3' is unknown; there are"),
        (functools.partial(Format, "int4", layout="columns"), "layout 'columns' is unknown"),
        (functools.partial(Format, "int4", 0), "group=0 must be at least 1"),
        (functools.partial(Format, "e2m1", 32, zero=8), "e2m1 is a float"),
    ):
        with pytest.raises(ValueError, match=message):
            make_format()


def test_what_the_kernel_leaves_to_xla(rng):
    arrays, layout = tiled(make(rng, "int8, rows", 6, 64)[0], Format("int8"))
    for x, message in (
        (jnp.zeros((513, 64), jnp.bfloat16), "x has 513 rows; the kernel is for 1 to 512"),
        (jnp.zeros((1, 64), np.float32), "x is float32; the kernel is for bfloat16 and float16"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            quantized_matmul(x, **arrays, format=layout, implementation="triton")
        assert quantized_matmul(x, **arrays, format=layout).shape == (x.shape[0], 6)
