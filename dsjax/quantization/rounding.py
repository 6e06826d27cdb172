"""A plain weight as a quantized leaf: scales from the extremes of each group, codes by rounding to nearest.

Everything here works on blocks `[..., R, rows, G, group]`: a weight cut into what shares a scale, with zeros where the
last block reaches over the edge. What there is once a block has the shape `[..., R, 1, G, 1]`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsjax.errors import ConfigError, ParameterError
from dsjax.quantization.codes import LIMITS, encode
from dsjax.quantization.hqq import refine
from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.schemes import Scheme, scheme
from pallas_kernels.quantized_matmul.formats import numbers as numbers_of
from pallas_kernels.quantized_matmul.formats import pack, scale_numbers

Fit = Literal["nearest", "hqq"]
_GGUF = ("q4_0", "q4_1", "q8_0")
_WITHIN_BLOCK = (-3, -1)
_SMALLEST_E4M3 = 2.0**-9


def quantize_array(
    weight: jax.Array | QuantizedArray,
    to: str | Scheme,
    *,
    fit: Fit = "nearest",
    dtype: Any = None,
    name: str = "the weight",
) -> QuantizedArray:
    """A weight in few bits. Pure and jittable.

    Args:
      weight: `[..., out, in]`, floating, or a quantized leaf, which is dequantized before.
      to: the scheme, or its name.
      fit: `"nearest"` takes scales from the extremes of each group, which every reader of the format expects, and
        GGUF's formats exactly as llama.cpp does; `"hqq"` looks for scales and zero points that make the error smaller
        (see `dsjax.quantization.hqq`), and makes zero points float16.
      dtype: what the leaf reads as; default that of the weight.
      name: of the weight in messages.

    Returns:
      The leaf.

    Raises:
      ConfigError: scheme or fit is unknown, or the scheme has no scales to fit.
      ParameterError: the weight is not floating, is no matrix, or has rows that are not whole groups.
    """
    to = scheme(to)
    check_fit(to, fit)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ParameterError(f"{name} has dtype {weight.dtype}; quantize floating weights")
    to.check(weight.shape, name)
    return _quantize(weight, to, fit, jnp.dtype(dtype or weight.dtype))


def check_fit(to: Scheme, fit: str) -> None:
    """Refuse a fit that there is not, or that a scheme has no scales for.

    Raises:
      ConfigError: names what there is.
    """
    if fit not in ("nearest", "hqq"):
        raise ConfigError(f"fit={fit!r} is unknown; 'nearest' and 'hqq' are known")
    if fit == "hqq" and to.scale_dtype in ("e8m0", "e4m3"):
        raise ConfigError(f"fit='hqq': the scales of '{to.name}' are too coarse to be fitted; take fit='nearest'")


@functools.partial(jax.jit, static_argnames=("to", "fit", "dtype"))
def _quantize(weight: Any, to: Scheme, fit: Fit, dtype: Any) -> QuantizedArray:
    if isinstance(weight, QuantizedArray):
        weight = weight.dequantize(jnp.float32)
    blocks = _blocks(weight.astype(jnp.float32), to)
    if fit == "nearest" and to.name in _GGUF:
        numbers, parts = _as_gguf(blocks, to.name)
    else:
        numbers, parts = _nearest(blocks, to) if fit == "nearest" else _fitted(blocks, to)
    codes = encode(numbers, to.element)
    codes = codes.reshape(*blocks.shape[:-4], blocks.shape[-4] * blocks.shape[-3], -1)
    codes = codes[..., : weight.shape[-2], : weight.shape[-1]]
    shapes = to.parts(weight.shape)
    parts = {name: part.reshape(shapes[name].shape) for name, part in parts.items()}
    return QuantizedArray(
        **{"minimums": None, **parts}, values=codes if to.bits == 8 else pack(codes, to.bits), scheme=to, dtype=dtype
    )


def _blocks(weight: jax.Array, to: Scheme) -> jax.Array:
    *lead, out, columns = weight.shape
    rows, group = to.rows or out, to.group_size or columns
    edges = [(0, 0)] * len(lead) + [(0, -out % rows), (0, -columns % group)]
    weight = jnp.pad(weight, edges) if any(after for _, after in edges) else weight
    return weight.reshape(*lead, -(-out // rows), rows, -(-columns // group), group)


def _over(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """Quotients; blocks whose scale is zero give zeros."""
    return jnp.where(scales == 0, 0, numbers / jnp.where(scales == 0, 1, scales))


def _signed_extreme(blocks: jax.Array) -> jax.Array:
    """The number of largest magnitude of each block, with its sign."""
    high = blocks.max(axis=_WITHIN_BLOCK, keepdims=True)
    low = blocks.min(axis=_WITHIN_BLOCK, keepdims=True)
    return jnp.where(-low > high, low, high)


def _nearest(blocks: jax.Array, to: Scheme) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Numbers to encode, and what is stored besides their codes."""
    (smallest, largest), stored = LIMITS[to.element], to.parts((1, to.unit))
    if to.has_zeros or to.has_minimum:
        high = jnp.maximum(blocks.max(axis=_WITHIN_BLOCK, keepdims=True), 0)
        low = jnp.minimum(blocks.min(axis=_WITHIN_BLOCK, keepdims=True), 0)
        scales = ((high - low) / (largest - smallest)).astype(stored["scales"].dtype)
        if to.has_minimum:
            minimums = low.astype(stored["minimums"].dtype)
            return _over(blocks - minimums, scales.astype(jnp.float32)), {"scales": scales, "minimums": minimums}
        divisor = scales.astype(jnp.float32)
        zeros = jnp.clip(jnp.round(_over(-low, divisor)), smallest, largest)
        return _over(blocks, divisor) + zeros, {"scales": scales, "zeros": zeros.astype(jnp.uint8)}
    if to.bits == 4 and to.zero:
        # The end that reaches further gets the extreme, as in llama.cpp: scales may be negative.
        scales = _signed_extreme(blocks) / (smallest - to.zero)
    else:
        scales = jnp.abs(_signed_extreme(blocks)) / (largest - to.zero)
    parts = {}
    if to.has_tensor_scale:
        parts["tensor_scale"] = scales.max(axis=(-4, -2), keepdims=True) / LIMITS["e4m3"][1]
        scales = jnp.where(scales == 0, 0, jnp.maximum(_over(scales, parts["tensor_scale"]), _SMALLEST_E4M3))
    if to.scale_dtype == "e8m0":
        parts["scales"] = _power_of_two(jnp.abs(_signed_extreme(blocks)), largest)
    else:
        parts["scales"] = scales.astype(stored["scales"].dtype)
    parts = jax.lax.optimization_barrier(parts)  # else XLA rounds a scale again for each of its weights
    divisor = scale_numbers(parts["scales"]) * parts.get("tensor_scale", 1.0)
    return _over(blocks, divisor) + to.zero, parts


def _power_of_two(extreme: jax.Array, largest: float) -> jax.Array:
    """OCP's rule: the exponent of the extreme less that of the largest number; biased by 127, in uint8."""
    exponent = jax.lax.bitcast_convert_type(extreme, jnp.int32) >> 23
    most = (jax.lax.bitcast_convert_type(jnp.float32(largest), jnp.int32) >> 23) - 127
    return jnp.clip(exponent - most, 1, 254).astype(jnp.uint8)


def _as_gguf(blocks: jax.Array, name: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As ggml-quants: codes are of the scale before it is rounded to float16, and halves are rounded up."""
    if name == "q8_0":
        scales = jnp.abs(_signed_extreme(blocks)) / 127
        numbers = _over(blocks, scales)
        return jnp.trunc(numbers + jnp.copysign(0.5, numbers)), {"scales": scales.astype(jnp.float16)}
    if name == "q4_0":
        scales = _signed_extreme(blocks) / -8
        return jnp.trunc(_over(blocks, scales) + 8.5), {"scales": scales.astype(jnp.float16)}
    low = blocks.min(axis=_WITHIN_BLOCK, keepdims=True)
    scales = (blocks.max(axis=_WITHIN_BLOCK, keepdims=True) - low) / 15
    parts = {"scales": scales.astype(jnp.float16), "minimums": low.astype(jnp.float16)}
    return jnp.trunc(_over(blocks - low, scales) + 0.5), parts


def _fitted(blocks: jax.Array, to: Scheme) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `_nearest`, with scales, and zero points where there are any, from `refine`."""
    numbers, parts = _nearest(blocks, to)
    dtype = parts["scales"].dtype
    scales = parts["scales"].astype(jnp.float32)
    moves = to.has_zeros or to.has_minimum
    zeros = jnp.full_like(scales, to.zero)
    if to.has_zeros:
        zeros = parts["zeros"].astype(jnp.float32)
    elif to.has_minimum:
        zeros = -_over(parts["minimums"].astype(jnp.float32), scales)

    def rounded(numbers: jax.Array) -> jax.Array:
        codes = encode(numbers, to.element)
        return codes.astype(jnp.float32) if to.bits == 8 else numbers_of(codes, to.element)

    scales, zeros = refine(blocks, scales, zeros, rounded, moves=moves, axes=_WITHIN_BLOCK)
    parts["scales"] = scales.astype(dtype)
    divisor = parts["scales"].astype(jnp.float32)
    if to.has_minimum:
        parts["minimums"] = (-zeros * divisor).astype(dtype)
        return _over(blocks - parts["minimums"], divisor), parts
    if to.has_zeros:
        parts["zeros"] = zeros.astype(jnp.float16)
        zeros = parts["zeros"].astype(jnp.float32)
    return _over(blocks, divisor) + zeros, parts
