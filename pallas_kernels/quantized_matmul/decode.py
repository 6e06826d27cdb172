"""Decoding of tiles to bfloat16 or float16, the same for every backend and for kernels that share the layout.

Every code is taken to its number without a conversion from integers: an integer is put into the mantissa of a large
power of two, which is then subtracted (exactly, zero point included); a small float is put where the exponent and
mantissa of the wider one lie, which is then multiplied by the power of two between their biases (exactly, subnormals
included).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import current_gpu
from pallas_kernels.quantized_matmul import tiles
from pallas_kernels.quantized_matmul.formats import ELEMENTS, NF4, Format

DTYPES = (jnp.bfloat16, jnp.float16)


def decode(
    words: Sequence[jax.Array], plane: int, format: Format, dtype: Any, zeros: jax.Array | None = None
) -> jax.Array:
    """Numbers of a plane, less their zero point, before their scale.

    Args:
      words: `uint16[..., N, width]` each, as `tiles.split_words` gives them.
      plane: which of `tiles.planes_of(format)`; it holds `width` consecutive weights.
      format: of the weight.
      dtype: bfloat16 or float16.
      zeros: integer zero points that broadcast to the words, or `None`. What else `format` and the arrays of a weight
        ask for is left to the caller: scales, minimums and floating zero points.

    Returns:
      `[..., N, width]`, exact but for NF4, whose table is rounded to `dtype`.
    """
    element, dtype = format.element, jnp.dtype(dtype)
    kind, mantissa = ELEMENTS[element], jnp.finfo(dtype).nmant
    if kind.exponent:
        # The bits from the lowest: mantissa, exponent, sign.
        targets = [*range(mantissa - kind.mantissa, mantissa + kind.exponent), 15]
        power = 2 ** (jnp.finfo(dtype).nexp - 1) - 1 - kind.bias
        return _times_power(_move(words, element, plane, targets, 0, dtype), power)
    if element == "nf4":
        return _look_up(words, plane, np.asarray(NF4, dtype))
    # 128 in bfloat16, 1024 in float16: its last bit counts 1.
    large = 2**mantissa
    constant = (2 ** (jnp.finfo(dtype).nexp - 1) - 1 + mantissa) << mantissa
    if kind.bits == 4:
        shift = large + format.zero + (0 if zeros is None else zeros.astype(dtype))
        return _move(words, element, plane, range(4), constant, dtype) - jnp.asarray(shift, dtype)
    # Two's complement: the highest bit counts -128.
    low = _move(words, element, plane, [*range(7), None], constant, dtype)
    high = _move(words, element, plane, [*(None,) * 7, 7], constant, dtype)
    zero = format.zero - (128 if element == "uint8" else 0)
    shift = zero if zeros is None else zeros.astype(dtype) + zero
    number = low - high
    return number if isinstance(shift, int) and shift == 0 else number - jnp.asarray(shift, dtype)


def _move(words, element, plane, targets, constant, dtype):
    if current_gpu() is None:
        return lax.bitcast_convert_type(tiles.move(words, element, plane, targets, constant), dtype)
    from pallas_kernels.quantized_matmul import assembly

    return assembly.move(words, tiles.terms_of(element, plane, targets), constant, dtype)


def _times_power(number, power):
    dtype = number.dtype
    if power == 0:
        return number
    if current_gpu() is not None or dtype == jnp.float16:
        return number * jnp.asarray(2.0**power, dtype)
    # XLA flushes subnormal numbers to zero on a CPU, which are those whose exponent is zero.
    bits = lax.bitcast_convert_type(number, jnp.uint16)
    mantissa = (bits & 127).astype(jnp.float32) * 2.0 ** (power - 126 - 7)
    subnormal = jnp.where(bits >> 15 == 1, -mantissa, mantissa).astype(dtype)
    normal = lax.bitcast_convert_type((bits + (power << 7)).astype(jnp.uint16), dtype)
    return jnp.where((bits >> 7) & 255 == 0, subnormal, normal)


def _look_up(words, plane, table):
    if current_gpu() is None:
        codes = tiles.move(words, "nf4", plane, range(4))
        level = [jnp.asarray(number, table.dtype) for number in table]
        for bit in range(4):
            is_set = (codes >> bit & 1) == 1
            level = [jnp.where(is_set, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        return level[0]
    from pallas_kernels.quantized_matmul import assembly

    return assembly.look_up(words[0], plane, table)
