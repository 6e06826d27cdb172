"""Codes of weights: which is nearest to a number. The way back is `pallas_kernels.quantized_matmul.formats.numbers`."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.formats import ELEMENTS, NF4, Element

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
