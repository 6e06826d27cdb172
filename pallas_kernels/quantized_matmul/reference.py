"""What the op means, written for reading."""

import jax
import jax.numpy as jnp

from pallas_kernels.few_row_matmul.reference import finish
from pallas_kernels.quantized_matmul import formats, tiles


def dequantize(
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    minimums: jax.Array | None = None,
    tensor_scale: jax.Array | None = None,
    *,
    format: formats.Format,
    dtype=jnp.float32,
) -> jax.Array:
    """The weight `[..., N, K]` that the arrays stand for, in either layout; computed in float32."""
    if format.layout == "tiles":
        codes = tiles.codes_of(values, format)
        scales, zeros, minimums = tiles.swapped(scales, zeros, minimums)
    else:
        codes = formats.codes_of(values, format.element)
    return formats.dequantize_codes(codes, scales, zeros, minimums, tensor_scale, format=format, dtype=dtype)


def matmul(x, values, scales, zeros, minimums, tensor_scale, *, format, bias, activation, partial):
    """The oracle of every backend; see `api.quantized_matmul`. All in float32."""
    weight = dequantize(values, scales, zeros, minimums, tensor_scale, format=format)
    product = jnp.einsum("mk,nk->mn", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    return product[None] if partial else finish(product, bias, activation, x.dtype)
