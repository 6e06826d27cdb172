"""The product in plain XLA operations: what runs on a CPU, and for more rows than the kernel takes.

A GPU dequantizes the weight and calls its library. On a CPU the weight is decoded by blocks of rows, whose floats stay
in the caches, and in pieces that lie together in its bytes, so that nothing is interleaved: as many products, each with
the part of `x` that goes with a piece.
Milliseconds of one core of an AMD EPYC, float32 rows, and a weight of 8192 x 2048 (int4, nf4 and e2m1 in groups, others
by rows): the product with a float32 weight, that with the weight dequantized whole, and this.

    rows    float32   whole   int4  int8  e4m3  nf4  e2m1  e3m2
       1        3.2    40.2    2.6   2.6   4.8  6.1   3.5  65.8
       8       14.2    54.5    4.8   4.3   7.4  8.6   5.9  75.2
      64       32.4    79.6   26.5  26.3  30.7 29.1  25.9  93.4
     512      195.6   246.6  211.2 197.4 205.3 204.7 202.3 273.3

At 2048 x 2048, whose floats fit in the caches, the gain over the whole is less, 3.7 to 0.7 ms for one row of int4 and
11 to 6.7 for 64. The loops over quarters of six bits are not vectorized. Multiplying and reducing without a product was
slower throughout, 47 ms for one row of int4.
"""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_gpu
from pallas_kernels.few_row_matmul.reference import finish
from pallas_kernels.quantized_matmul import formats
from pallas_kernels.quantized_matmul.formats import ELEMENTS, RUN
from pallas_kernels.quantized_matmul.reference import dequantize

BLOCK = 256  # rows of the weight: 2 MB of float32 at 2048 columns
FEW_ROWS = 128  # up to which, but for one, XLA:CPU is faster with the weight on the left
CONTRACT = (((1,), (1,)), ((), ()))


def matmul(x, values, scales, zeros, minimums, tensor_scale, *, format, bias, activation, partial):
    """See `api.quantized_matmul`; there is one part."""
    arrays = (values, scales, zeros, minimums, tensor_scale)
    if current_gpu() is None and _streams(format, x.shape[1]):
        product = _stream(x.astype(jnp.float32), arrays, format)
    else:
        weight = dequantize(*arrays, format=format, dtype=x.dtype)
        product = lax.dot_general(x, weight, CONTRACT, preferred_element_type=jnp.float32)
    return product[None] if partial else finish(product, bias, activation, x.dtype)


def _streams(format, inner):
    whole_blocks = format.rows is None or BLOCK % format.rows == 0
    whole_groups = format.group is None or inner % format.group == 0
    whole_pieces = format.bits == 8 or format.group is None or format.group % RUN == 0 or _lanes(format) == format.group
    return format.layout == "rows" and whole_blocks and whole_groups and whole_pieces


def _lanes(format):
    """Weights of a run that lie together."""
    return {4: 16, 6: 8}[format.bits]


def _stream(x, arrays, format):
    values, *small = arrays
    out = values.shape[0]
    if ELEMENTS[format.element].exponent and format.bits == 8:
        # Once and before all else: XLA:CPU takes ten times as long for whatever touches arrays of float8.
        values = lax.optimization_barrier(lax.bitcast_convert_type(values, jnp.uint8))

    def rows(start, count):
        def cut(array):
            if array is None or array.shape[0] == 1:
                return array
            per = 1 if array.shape[0] == out else format.rows
            cut = lax.dynamic_slice_in_dim(array, start // per, math.ceil(count / per))
            return cut if per == 1 else jnp.repeat(cut, per, axis=0)[:count]

        return _product(xs, cut(values), [cut(array) for array in small], format)

    lanes = x.shape[1] if format.bits == 8 else _lanes(format)
    pieces = 1 if format.bits == 8 else RUN // lanes
    xs = jnp.moveaxis(x.reshape(x.shape[0], -1, pieces, lanes), 2, 0).reshape(pieces, x.shape[0], -1)
    full, rest = divmod(out, BLOCK)
    products = [rows(full * BLOCK, rest)] if rest else []
    if full:
        blocks = lax.map(lambda i: rows(i * BLOCK, BLOCK), jnp.arange(full))
        products.insert(0, jnp.moveaxis(blocks, 0, 1).reshape(x.shape[0], full * BLOCK))
    return jnp.concatenate(products, axis=-1)


def _product(xs, values, small, format):
    scales, zeros, minimums, tensor_scale = small
    pieces, rows = _pieces(values, format.bits), xs.shape[1]
    total = jnp.zeros((), jnp.float32)
    for i, (codes, part) in enumerate(zip(pieces, xs, strict=True)):
        number = formats.numbers(codes, format.element)

        def spread(array, i=i):
            # Of groups shorter than a run a piece holds every second one.
            is_short = format.bits < 8 and format.group is not None and format.group < RUN
            return jnp.asarray(array[:, i :: len(pieces)] if is_short else array, jnp.float32)[..., None]

        number = number.reshape(number.shape[0], spread(scales).shape[1], -1) - format.zero
        if zeros is not None:
            number -= spread(zeros)
        number *= spread(formats.scale_numbers(scales))
        if minimums is not None:
            number += spread(minimums)
        weight = number.reshape(number.shape[0], -1)
        if 1 < rows <= FEW_ROWS:
            total += lax.dot_general(weight, part, CONTRACT, preferred_element_type=jnp.float32)
        else:
            total += lax.dot_general(part, weight, CONTRACT, preferred_element_type=jnp.float32)
    if 1 < rows <= FEW_ROWS:
        total = lax.optimization_barrier(total).T  # else XLA swaps the operands back to save the transpose
    return total if tensor_scale is None else total * tensor_scale[:, 0]


def _pieces(values, bits):
    """Codes `[N, runs, lanes]` by their place in a run: the halves of 4 bits, the quarters of 6."""
    if bits == 8:
        return [values]
    runs = values.reshape(values.shape[0], -1, RUN * bits // 8)
    if bits == 4:
        return [runs & 15, runs >> 4]
    high = runs[..., 16:]
    low = [runs[..., 8 * (i % 2) : 8 * (i % 2) + 8] >> 4 * (i // 2) & 15 for i in range(4)]
    return [each | (high >> 2 * i & 3) << 4 for i, each in enumerate(low)]
