"""The part of the product that differs where the weights are in few bits: a loop over units of packed words.

Words come through a ring in shared memory to the registers in the order of the tensor cores and are decoded there two
at a time; see `quantized_matmul.tiles` for their layout.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton
from pallas_kernels.quantized_matmul import tiles
from pallas_kernels.quantized_matmul.decode import DTYPES, decode
from pallas_kernels.quantized_matmul.formats import scale_numbers

KIB = 2**10
IN_FLIGHT = 32 * KIB  # bytes of the weights that a program should have under way
SHARED = 96 * KIB  # shared memory that every GPU from 8.0 on gives a program
# With few rows, tiles are narrowed until so many of the multiprocessors have a program: fewer than with plain weights,
# since what is not decoding costs the same for a narrow tile.
FILL = 0.8
# Rows of the weight in a tile by rows of a block, where tensor cores read packed weights from registers of four warps;
# and where each warp reads its own, which takes more of them.
WIDEST_OF_GROUPS = {16: 128, 32: 256, 64: 256, 128: 128}
WIDEST = {16: 128, 32: 128, 64: 64, 128: 64}


def refusals(x, weight):
    """Why the kernel can not run on weights in few bits."""
    reasons = []
    if weight.format.layout != "tiles":
        reasons.append("the weights are in rows; lay them out with to_tiles, once")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}; the kernel for weights in few bits is for bfloat16 and float16")
    # Triton's offsets into arrays of 16 bits have 64 bits from 4 GiB on.
    return reasons


def block_sizes(block_rows, columns, weight, *, gated, busy, gpu):
    """As `triton.block_sizes`, where the contracted axis goes by units."""
    needed = FILL * (8 if gpu is None else gpu.cores) if block_rows <= 32 else 0
    _, units, _, words = weight.values.shape
    has_groups = gpu is None or gpu.capability[0] in (9, 10)
    block_n = (WIDEST_OF_GROUPS if has_groups else WIDEST).get(block_rows, 64) // (2 if gated else 1)
    # What goes with groups is loaded a step ahead, into registers.
    if block_rows >= 64 and (weight.minimums is not None or (block_rows == 64 and weight.zeros is not None)):
        block_n //= 2
    while pl.cdiv(columns, block_n) * busy < needed and block_n > 32:
        block_n //= 2
    block_n = min(block_n, max(16, pl.next_power_of_2(columns)))
    rows_of_weight = block_n * (2 if gated else 1)
    step = 2 * words * rows_of_weight + 2 * weight.shape[2] // units * block_rows
    most = 5 if has_groups or block_rows < 128 else 2
    stages = min(most, 1 + pl.cdiv(IN_FLIGHT, 2 * words * rows_of_weight), 1 + units, SHARED // step)
    return {
        "block_n": block_n,
        "num_warps": 4 if rows_of_weight * block_rows < 256 * 32 or (has_groups and rows_of_weight < 128) else 8,
        "num_stages": max(stages, 1),
    }


def sums_of_products(refs, load_x, expert, weight_row, starts, *, format, block_m, swap, is_expert):
    """Products of a block's rows with a tile of their expert's weights, scaled; float32.

    Args:
      refs: `values`, `scales`, and those of `zeros`, `minimums` and `tensor_scale` that there are.
      load_x: gives a block's rows at some places of the contracted axis, `[block_m, places]`.
      expert: whose weights.
      weight_row: rows of the tile in the weight.
      starts: what is added to them for each tile: one, or that of the gate and that of its input.
      format: of the weights.
      block_m: rows of the block.
      swap: whether the weight is the left operand, which Hopper's tensor cores read from registers.
      is_expert: whether to compute at all.

    Returns:
      For each of `starts`, `[block_m, block_n]`, or with `swap` `[block_n, block_m]`.
    """
    values, scales = refs["values"], refs["scales"]
    zeros, minimums = refs.get("zeros"), refs.get("minimums")
    units, width = values.shape[1], tiles.width_of(format, values)
    planes, lane = tiles.planes_of(format), jnp.arange(width, dtype=jnp.int32)
    unit, block_n = planes * width, weight_row.shape[0]
    has_float_zeros = zeros is not None and jnp.issubdtype(zeros.dtype, jnp.floating)
    has_offset = minimums is not None or has_float_zeros
    # One scale a row is left to the end, if the sums of the groups need nothing else.
    scales_last = format.group is None and not has_offset
    group = units * unit if format.group is None else format.group

    def of_column(vector):
        return vector[:, None] if swap else vector[None, :]

    def dot(x, weight):
        left, right = (weight, x) if swap else (x, weight)
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def of_group(ref, group, start):
        at = start + weight_row
        block = 0 * at if format.rows is None else at if format.rows == 1 else at // format.rows
        return pltriton.load(ref.at[expert, group, block])

    per_group = min(group, unit) // width  # planes of a step that share a scale
    groups = unit // width // per_group
    small = [ref for ref in (None if scales_last else scales, zeros, minimums) if ref is not None]

    def fetch(index):
        """What goes with each group of a step, for each of `starts`."""
        first = index // (group // unit) if group >= unit else index * groups
        return tuple(of_group(ref, first + i, start) for i in range(groups) for start in starts for ref in small)

    # The sums of a group are scaled, which costs by rows of the block; or its weights, which does not, but rounds them.
    on_sums = scales_last or group >= 2 * block_m or refs["x"].dtype == jnp.float16

    def group_sums(first, words, xs, fetched):
        dtype = xs[0].dtype
        scale = 1.0 if scales_last else scale_numbers(next(fetched))
        exact_zero, offset = None, None
        if has_float_zeros:
            offset = -scale * next(fetched).astype(jnp.float32)
        elif zeros is not None:
            exact_zero = next(fetched)[:, None]
        if minimums is not None:
            offset = (0.0 if offset is None else offset) + next(fetched).astype(jnp.float32)
        total, x_total = 0.0, 0.0
        for plane in range(first, first + per_group):
            weight = decode(words, plane, format, dtype, exact_zero)
            if not on_sums:
                weight *= jnp.asarray(scale)[:, None].astype(dtype)
                weight = weight if offset is None else weight + offset[:, None].astype(dtype)
            total += dot(xs[plane], weight)
            if on_sums and offset is not None:
                x_total += dot(xs[plane], jnp.ones((block_n, width), dtype))
        if on_sums and not scales_last:
            total *= of_column(scale)
        if on_sums and offset is not None:
            total += x_total * of_column(offset)
        return total

    def step(index, carry):
        sums, fetched = carry
        # A step ahead, since these small loads do not go through the ring.
        ahead = fetch(jnp.minimum(index + 1, units - 1))
        xs = [load_x(index * unit + plane * width + lane) for plane in range(planes)]
        words = [
            [
                pltriton.load(values.at[expert, index, (start + weight_row)[:, None], (word * width + lane)[None, :]])
                for word in range(values.shape[3] // width)
            ]
            for start in starts
        ]
        given, sums = iter(fetched), list(sums)
        for i in range(groups):
            for j in range(len(starts)):
                sums[j] += group_sums(i * per_group, words[j], xs, given)
        return tuple(sums), ahead

    shape = (block_n, block_m) if swap else (block_m, block_n)
    steps = jnp.where(is_expert, jnp.int32(units), jnp.int32(0))
    carry = (jnp.zeros(shape, jnp.float32),) * len(starts), fetch(jnp.int32(0))
    sums, _ = lax.fori_loop(0, steps, step, carry)
    if scales_last:
        scale = (scale_numbers(of_group(scales, 0, start)) for start in starts)
        sums = [total * of_column(each) for total, each in zip(sums, scale, strict=True)]
    if "tensor_scale" in refs:
        ref = refs["tensor_scale"]
        rows = (0 * weight_row if ref.shape[1] == 1 else start + weight_row for start in starts)
        factors = (pltriton.load(ref.at[expert, row, 0]) for row in rows)
        sums = [total * of_column(factor) for total, factor in zip(sums, factors, strict=True)]
    return sums
