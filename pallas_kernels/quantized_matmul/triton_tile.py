"""The loop over units of packed words that kernels for weights in few bits share.

Words come through a ring in shared memory to the registers in the order of the tensor cores and are decoded there two
at a time; see `tiles` for their layout.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.compat import pltriton
from pallas_kernels.quantized_matmul import assembly, tiles
from pallas_kernels.quantized_matmul.decode import decode
from pallas_kernels.quantized_matmul.formats import Format, scale_numbers


def sums_of_products(
    refs: Mapping[str, Any],
    load_x: Callable[[jax.Array], jax.Array],
    weight_row: jax.Array,
    starts: Sequence[Any],
    *,
    format: Format,
    block_m: int,
    swap: bool,
    steps: tuple[Any, Any],
    least_group: int,
    lead: tuple[Any, ...] = (),
) -> list[jax.Array]:
    """Products of a block of rows with a tile of the weight, scaled.

    Args:
      refs: `x`, `values`, `scales`, and those of `zeros`, `minimums` and `tensor_scale` that there are.
      load_x: gives the rows at some places of the contracted axis, `[block_m, places]`.
      weight_row: rows of the weight, `int32[block_n]`.
      starts: what is added to them for each tile: one, or that of the gate and that of its input.
      format: of the weight.
      block_m: rows of the block.
      swap: whether the weight is the left operand, which Hopper's tensor cores read from registers.
      steps: the first unit of the contracted axis, and the one after the last.
      least_group: weights of a group from which on its sums are scaled, which costs by rows and takes registers; below,
        its weights are, which rounds them.
      lead: where in its arrays the weight is: nothing, or an expert.

    Returns:
      For each of `starts`, `float32[block_m, block_n]`, or with `swap` `[block_n, block_m]`.
    """
    values_ref, scales_ref, x_ref = refs["values"], refs["scales"], refs["x"]
    zeros_ref, minimums_ref = refs.get("zeros"), refs.get("minimums")
    units, words_of_unit = values_ref.shape[len(lead)], values_ref.shape[-1]
    width, dtype, block_n = tiles.width_of(format, values_ref), x_ref.dtype, weight_row.shape[0]
    unit, lane = tiles.planes_of(format) * width, jnp.arange(width, dtype=jnp.int32)
    has_float_zeros = zeros_ref is not None and jnp.issubdtype(zeros_ref.dtype, jnp.floating)
    has_offset = minimums_ref is not None or has_float_zeros
    # One scale a row is left to the end, if the sums of the groups need nothing else.
    scales_last = format.group is None and not has_offset
    group = units * unit if format.group is None else format.group
    on_sums = scales_last or group >= least_group or dtype == jnp.float16
    per_chunk = min(group, unit) // width  # planes that share a scale
    chunks = range(unit // width // per_chunk)
    in_steps = [ref for ref in (None if scales_last else scales_ref, zeros_ref, minimums_ref) if ref is not None]

    def of_column(vector):
        return vector[:, None] if swap else vector[None, :]

    def multiply_add(a, b, c):
        if dispatch.current_gpu() is None:
            return a * b + c
        return assembly.multiply_add(a, jnp.broadcast_to(b, a.shape), c)

    def dot(x, weight):
        left, right = (weight, x) if swap else (x, weight)
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def of_group(ref, index, start):
        at = start + weight_row
        block = 0 * at if format.rows is None else at if format.rows == 1 else at // format.rows
        return pltriton.load(ref.at[(*lead, index, block)])

    def fetch(index):
        """What goes with a step's groups, for each chunk and each start."""
        first = index // (group // unit) if group >= unit else index * (unit // group)
        return tuple(of_group(ref, first + chunk, start) for chunk in chunks for start in starts for ref in in_steps)

    def add_chunk(total, chunk, words, xs, fetched):
        """The sums with what the planes of one group add."""
        scale = None if scales_last else _scale_numbers(next(fetched))
        zeros = None if zeros_ref is None else next(fetched)
        minimum = None if minimums_ref is None else next(fetched).astype(jnp.float32)
        if scale is not None and zeros is not None and has_float_zeros:
            minimum = -scale * zeros.astype(jnp.float32) + (0 if minimum is None else minimum)
            zeros = None
        planes = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        shift = None if zeros is None else zeros[:, None]
        weights = [decode(words, plane, format, dtype, shift) for plane in planes]
        if scale is None or not on_sums:
            for plane, weight in zip(planes, weights, strict=True):
                if scale is not None:
                    weight *= scale[:, None].astype(dtype)
                if minimum is not None:
                    weight += minimum[:, None].astype(dtype)
                total += dot(xs[plane], weight)
            return total
        if minimum is not None:
            ones = jnp.ones((block_n, width), dtype)
            total = multiply_add(sum(dot(xs[plane], ones) for plane in planes), of_column(minimum), total)
        here = sum(dot(xs[plane], weight) for plane, weight in zip(planes, weights, strict=True))
        return multiply_add(here, of_column(scale), total)

    def step(index, carry):
        sums, fetched = carry
        # A step ahead, since these small loads do not go through the ring.
        ahead = fetch(jnp.minimum(index + 1, units - 1))
        xs = [load_x(index * unit + plane * width + lane) for plane in range(tiles.planes_of(format))]
        words = [
            [
                pltriton.load(
                    values_ref.at[(*lead, index, (start + weight_row)[:, None], (word * width + lane)[None, :])]
                )
                for word in range(words_of_unit // width)
            ]
            for start in starts
        ]
        given, sums = iter(fetched), list(sums)
        for chunk in chunks:
            for i in range(len(starts)):
                sums[i] = add_chunk(sums[i], chunk, words[i], xs, given)
        return tuple(sums), ahead

    shape = (block_n, block_m) if swap else (block_m, block_n)
    carry = (jnp.zeros(shape, jnp.float32),) * len(starts), fetch(steps[0])
    sums, _ = lax.fori_loop(*steps, step, carry)
    if scales_last:
        scales = (_scale_numbers(of_group(scales_ref, 0, start)) for start in starts)
        sums = [total * of_column(scale) for total, scale in zip(sums, scales, strict=True)]
    if "tensor_scale" in refs:
        ref = refs["tensor_scale"]
        rows = (0 * weight_row if ref.shape[len(lead)] == 1 else start + weight_row for start in starts)
        factors = (pltriton.load(ref.at[(*lead, row, 0)]) for row in rows)
        sums = [total * of_column(factor) for total, factor in zip(sums, factors, strict=True)]
    return list(sums)


def _scale_numbers(scales):
    if scales.dtype != jnp.float8_e4m3fn:
        return scale_numbers(scales)
    # Older GPUs have no conversion: with its sign and the rest moved to where float16 has them, a number is 256 times
    # too small.
    bits = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint16)
    bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256
