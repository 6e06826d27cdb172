"""What the op means, written for reading; the arithmetic of a row is shared with the `xla` backend."""

import jax
import jax.numpy as jnp

TINY = float(jnp.finfo(jnp.float32).tiny)  # the scale of a row of zeros: nothing is ever divided by zero


def normalize(x, weight, eps, offset):
    """RMS norm of each head (arXiv 1910.07467), float32 in and out."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * (weight.astype(jnp.float32) + offset)


def rotate(x, cos, sin, interleaved):
    """Rotate the first `2 * R2` dimensions of every head by given angles (arXiv 2104.09864); the rest passes."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
        return jnp.concatenate([turned, rest], axis=-1)
    return jnp.concatenate([first, second, rest], axis=-1)


def largest(dtype):
    """The code that the largest element of a row becomes."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def reciprocal(x, approximation=None):
    """`1 / x` of positive normal numbers, correctly rounded on every device.

    Compilers for GPUs take approximations for it, each its own, that are wrong in the last bit or two.
    """
    significand, found = bits(x) & 0x7FFFFF | 0x800000, bits(1 / x if approximation is None else approximation)
    for _ in range(3):
        # What the product of both significands lacks to a power of two: that power is a multiple of 2 ** 32, and what
        # is lacking is less than 2 ** 31, so nothing is lost in integers that wrap around.
        rest = -(significand * (found & 0x7FFFFF | 0x800000))
        found += jnp.where(2 * rest > significand, 1, 0) - jnp.where(2 * rest < -significand, 1, 0)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def bits(x):
    """The bits of a float32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def quantize(x, dtype):
    """Codes and scales, symmetric by row: `x` is about `codes * scales[..., None]`.

    In products with exact reciprocals, which no compiler rearranges, so that every backend gives the same bytes.

    Args:
      x: float32, any number of rows of `H`.
      dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
      Codes of the shape of `x`, rounded half to even, and float32 scales without its last axis, never 0.
    """
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) * (1 / largest(dtype)), TINY)
    codes = x * reciprocal(scales)[..., None]
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scales


def prepare(qkv, kv_heads, cos, sin, interleaved, q_norm, k_norm, norm_eps, norm_offset, q_dtype):
    """Queries in their dtype, keys and values in float32; all that is left is to write them."""
    qkv = qkv.astype(jnp.float32)
    if qkv.ndim == 4:
        qkv = jnp.sum(qkv, axis=0)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if q_norm is not None:
        q = normalize(q, q_norm, norm_eps, norm_offset)
    if k_norm is not None:
        k = normalize(k, k_norm, norm_eps, norm_offset)
    if cos is not None:
        q, k = (rotate(x, cos, sin, interleaved) for x in (q, k))
    return q.astype(q_dtype), k, v


def rotary_page_write(
    qkv,
    key_pages,
    value_pages,
    page,
    offset,
    *,
    cos,
    sin,
    interleaved,
    q_norm,
    k_norm,
    norm_eps,
    norm_offset,
    key_scales,
    value_scales,
    q_dtype,
):
    """The oracle of every backend; see `api.rotary_page_write`. It copies the pool."""
    q, k, v = prepare(qkv, key_pages.shape[1], cos, sin, interleaved, q_norm, k_norm, norm_eps, norm_offset, q_dtype)
    page = jnp.where(page < 0, key_pages.shape[0], page)  # a negative index would count from the end

    def write(pages, scales, rows):
        if scales is not None:
            rows, row_scales = quantize(rows, pages.dtype)
            scales = scales.at[page, :, offset].set(row_scales, mode="drop")
        return pages.at[page, :, offset].set(rows.astype(pages.dtype), mode="drop"), scales

    key_pages, key_scales = write(key_pages, key_scales, k)
    value_pages, value_scales = write(value_pages, value_scales, v)
    return q, key_pages, value_pages, key_scales, value_scales
