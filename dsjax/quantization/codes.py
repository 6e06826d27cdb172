"""Codes of weights: which is nearest to a number, and which number a code is.

How codes are packed into bytes is told in `pallas_kernels.quantized_matmul.formats`, for the kernels that unpack them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.formats import ELEMENTS, NF4
from pallas_kernels.quantized_matmul.formats import Element as Element

# The smallest and the largest number of each element.
LIMITS = {
    "int4": (0.0, 15.0),
    "int8": (-128.0, 127.0),
    "uint8": (0.0, 255.0),
    "nf4": (-1.0, 1.0),
    "e2m1": (-6.0, 6.0),
    "e3m2": (-28.0, 28.0),
    "e4m3": (-448.0, 448.0),
    "e5m2": (-57344.0, 57344.0),
}


def encode(numbers: jax.Array, element: str) -> jax.Array:
    """Codes nearest to numbers, ties to even; numbers beyond the ends get the ends.

    Args:
      numbers: floating.
      element: a name in `ELEMENTS`.

    Returns:
      Codes not packed: uint8, or the element's own dtype at 8 bits.
    """
    kind, numbers = ELEMENTS[element], numbers.astype(jnp.float32)
    if element == "nf4":
        # A sum of comparisons, which is elementwise and fuses; a search would not.
        borders = (np.asarray(NF4[1:]) + np.asarray(NF4[:-1])) / 2
        codes = jnp.zeros(numbers.shape, jnp.uint8)
        for border in borders.astype(np.float32):
            codes += (numbers > border).astype(jnp.uint8)
        return codes
    clipped = jnp.clip(numbers, *LIMITS[element])
    if kind.exponent and kind.bits < 8:
        return _encode_float(clipped, kind)
    return (clipped if kind.exponent else jnp.round(clipped)).astype(kind.dtype)


def _encode_float(numbers: jax.Array, kind: Element) -> jax.Array:
    magnitude, lowest = jnp.abs(numbers), 1 - kind.bias  # the exponent of the smallest normal number
    exponent = (jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 127
    exponent = jnp.maximum(exponent, lowest)
    power = jax.lax.bitcast_convert_type((127 + kind.mantissa - exponent) << 23, jnp.float32)
    mantissa = jnp.round(magnitude * power).astype(jnp.int32)
    # With its leading one the mantissa counts one more exponent, and when it rounds up to the next, that carries over.
    code = ((exponent - lowest) << kind.mantissa) + mantissa
    return (code | jnp.signbit(numbers).astype(jnp.int32) << (kind.bits - 1)).astype(jnp.uint8)


def decode(codes: jax.Array, element: str) -> jax.Array:
    """The numbers that codes, not packed, stand for: exactly, in float32."""
    kind = ELEMENTS[element]
    if element == "nf4":
        return jnp.asarray(NF4, jnp.float32)[codes]
    if kind.bits == 8 or not kind.exponent:
        return codes.astype(jnp.float32)
    bits = codes.astype(jnp.int32)
    exponent, mantissa = bits >> kind.mantissa & (1 << kind.exponent) - 1, bits & (1 << kind.mantissa) - 1
    # In units of the smallest number, every one is an integer, so no float on the way is subnormal.
    units = jnp.where(exponent == 0, mantissa, (mantissa | 1 << kind.mantissa) << jnp.maximum(exponent - 1, 0))
    magnitude = units.astype(jnp.float32) * 2.0 ** (1 - kind.bias - kind.mantissa)
    return jnp.where(bits >> (kind.bits - 1) == 1, -magnitude, magnitude)
