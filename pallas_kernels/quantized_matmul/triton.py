"""The product as one Pallas-Triton launch that streams the packed weight once for each tile of rows.

A program owns a tile of columns, a tile of rows, and a range of the contracted axis, and takes a unit of it at a time:
words of the weight come through a ring in shared memory to the registers in the order of the tensor cores, are decoded
there two at a time, and multiplied by the rows, which come from the L2 cache. With many rows the weight is the left
operand: then Hopper's tensor cores read it from registers, where it was decoded, and not from shared memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.few_row_matmul.triton import ACTIVATIONS
from pallas_kernels.quantized_matmul import assembly, tiles
from pallas_kernels.quantized_matmul.api import MAX_ROWS
from pallas_kernels.quantized_matmul.decode import DTYPES, decode
from pallas_kernels.quantized_matmul.formats import scale_numbers

OP = "quantized_matmul"
KIB = 2**10
IN_FLIGHT = 32 * KIB  # bytes of the weight that a program should have under way
SHARED = 96 * KIB  # shared memory that every GPU from 8.0 on gives a program
LARGE_SHARED = 160 * KIB
HAVE_LARGE_SHARED = ((8, 0), (9, 0), (10, 0), (10, 3))
FILL = 0.8  # a product is split until this many of the multiprocessors have a program


def refusals(x, values, scales, zeros, minimums, tensor_scale, *, format, gpu):
    """Why the kernel can not run."""
    del scales, zeros, minimums, tensor_scale
    reasons = dispatch.triton_refusals(gpu)
    if format.layout != "tiles":
        reasons.append("the weight is in rows; lay it out with to_tiles, once")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        reasons.append(f"x has {x.shape[0]} rows; the kernel is for 1 to {MAX_ROWS}")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}; the kernel is for bfloat16 and float16")
    if not values.size:
        reasons.append(f"values {values.shape} are empty, and Triton can not launch an empty grid")
    if values.size > 2**31:
        reasons.append(f"values {values.shape} have more elements than 32-bit offsets reach")
    return reasons


def block_sizes(rows, columns, *, units, unit_bytes, unit, gated, partial, gpu):
    """Sizes where the table is silent.

    The wider the tile of columns, the less of `x` is read from L2. With `partial`, the multiprocessors are filled by
    splits, and by narrower tiles only where that would take too many; without, by narrower tiles alone, since adding up
    parts would take a second kernel.

    Args:
      rows: of `x`.
      columns: of the result.
      units: along the contracted axis.
      unit_bytes: bytes of a unit of a row of the weight.
      unit: weights of it.
      gated: whether a program has a tile of gate rows and one of up rows.
      partial: whether the contracted axis may be split.
      gpu: what is compiled for, or `None`.

    Returns:
      `block_m` and `block_n`, rows and columns of a program; `splits`; `swap`, whether the weight is the left operand;
      `num_warps`; `num_stages`.
    """
    needed = FILL * (8 if gpu is None else gpu.cores)
    block_m = _block_m(rows, gated)
    tiles_m, tiles_n = pl.cdiv(rows, block_m), 2 if gated else 1
    block_n = {16: 128, 32: 256, 64: 256, 128: 128}[block_m] // tiles_n
    # Hopper's tensor cores take the left operand from registers from 64 rows on, Blackwell's by way of their memory.
    from_rows = {9: 32, 10: 64}.get(9 if gpu is None else gpu.capability[0])
    if from_rows is None and gated and block_m == 64:
        block_n = 64  # twice the sums would not fit in registers beside a decoded weight
    # Parts are written and read again: each at most an eighth of the weight's bytes, or four parts.
    most_splits = min(units, 8, max(4, units * unit_bytes // (32 * block_m))) if partial else 1
    while pl.cdiv(columns, block_n) * tiles_m * most_splits < needed and block_n > (32 if block_m == 16 else 64):
        block_n //= 2
    programs = pl.cdiv(columns, block_n) * tiles_m
    splits = next((count for count in range(1, most_splits) if programs * count >= needed), most_splits)
    weight_step = unit_bytes * block_n * tiles_n
    shared = LARGE_SHARED if block_m >= 64 and gpu is not None and gpu.capability in HAVE_LARGE_SHARED else SHARED
    stages = min(5, 1 + pl.cdiv(IN_FLIGHT, weight_step), 1 + pl.cdiv(units, splits))
    return {
        "block_m": block_m,
        "block_n": block_n,
        "splits": splits,
        "swap": from_rows is not None and block_m >= from_rows,
        "num_warps": 8 if block_n >= 128 and block_m * block_n * tiles_n >= 2**13 else 4,
        "num_stages": max(1, min(stages, shared // (weight_step + 2 * unit * block_m))),
    }


def _block_m(rows, gated):
    # The sums of a gate and of its input take twice the registers.
    return min(64 if gated else 128, max(16, pl.next_power_of_2(rows)))


def matmul(x, values, scales, zeros, minimums, tensor_scale, *, format, bias, activation, partial, config=None):
    """See `api.quantized_matmul`.

    `config` is what `block_sizes` returns. By default it comes from the table of tuned sizes, by `block_m` (rows
    rounded up to a power of two from 16 to 128), `columns` of the result, `inner`, `gated`, `partial` and `bits`.
    """
    rows, inner = x.shape
    gated = activation is not None
    units, out, words = values.shape
    columns = out // (2 if gated else 1)
    gpu = dispatch.current_gpu()
    shape = {"gated": gated, "partial": partial}
    key = {"columns": columns, "inner": inner, "bits": format.bits, **shape}
    config = (
        config
        or dispatch.tuned(OP, gpu, block_m=_block_m(rows, gated), **key)
        or block_sizes(rows, columns, units=units, unit_bytes=2 * words, unit=inner // units, gpu=gpu, **shape)
    )
    block_m, block_n, splits = (config[name] for name in ("block_m", "block_n", "splits"))
    small = {"zeros": zeros, "minimums": minimums, "tensor_scale": tensor_scale, "bias": bias}
    given = tuple(name for name, each in small.items() if each is not None)
    return triton_call(
        functools.partial(
            _kernel,
            names=given,
            format=format,
            block_m=block_m,
            block_n=block_n,
            splits=splits,
            swap=config["swap"],
            activation=activation,
        ),
        x,
        values,
        scales,
        *(small[name] for name in given),
        out_shape=jax.ShapeDtypeStruct(
            (splits, rows, columns) if partial else (rows, columns), jnp.float32 if partial else x.dtype
        ),
        grid=(pl.cdiv(rows, block_m), pl.cdiv(columns, block_n), splits),
        name=OP,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _kernel(x_ref, values_ref, scales_ref, *refs, names, format, block_m, block_n, splits, swap, activation):
    *refs, out_ref = refs
    small = dict(zip(names, refs, strict=True))
    (rows, inner), columns, units = x_ref.shape, out_ref.shape[-1], values_ref.shape[0]
    width, unit = tiles.width_of(format, values_ref), inner // units
    row, split = pl.program_id(0) * block_m + jnp.arange(block_m), pl.program_id(2)
    column = pl.program_id(1) * block_n + jnp.arange(block_n)
    # Past the last column, the last one again: loads of the weight need no mask.
    weight_row = column if columns % block_n == 0 else jnp.minimum(column, columns - 1)
    starts = (0,) if activation is None else (0, columns)
    is_row = None if rows % block_m == 0 else row[:, None] < rows
    lane, words_each = jnp.arange(width), values_ref.shape[2] // width

    def flat(vector):
        """A number for each column, against the sums."""
        return vector[:, None] if swap else vector[None, :]

    def multiply_add(a, b, c):
        if dispatch.current_gpu() is None:
            return a * b + c
        return assembly.multiply_add(a, jnp.broadcast_to(b, a.shape), c)

    def dot(x, weight):
        left, right = (weight, x) if swap else (x, weight)
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def of_group(ref, group, start):
        at = start + weight_row
        block = 0 * at if format.rows is None else at if format.rows == 1 else at // format.rows
        return ref[group, block]

    zeros_ref, minimums_ref = small.get("zeros"), small.get("minimums")
    has_float_zeros = zeros_ref is not None and jnp.issubdtype(zeros_ref.dtype, jnp.floating)
    has_offset = minimums_ref is not None or has_float_zeros
    # One scale a row is left to the end, if the sums of the groups need nothing else.
    scales_last = format.group is None and not has_offset
    group = inner if format.group is None else format.group
    # The sums of a group are scaled, which costs by rows of `x`; or its weights, which does not, but rounds them.
    on_sums = scales_last or group >= 2 * block_m * len(starts) or x_ref.dtype == jnp.float16
    per_chunk = min(group, unit) // width  # planes that share a scale
    chunks = range(unit // width // per_chunk)
    in_steps = [ref for ref in (None if scales_last else scales_ref, zeros_ref, minimums_ref) if ref is not None]

    def fetch(index):
        """What goes with a step's groups, for each chunk and each start."""
        found = []
        for chunk in chunks:
            at = index // (group // unit) if group >= unit else index * (unit // group) + chunk
            found += [of_group(ref, at, start) for start in starts for ref in in_steps]
        return tuple(found)

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
        weights = [decode(words, plane, format, x_ref.dtype, shift) for plane in planes]
        if scale is None or not on_sums:
            for plane, weight in zip(planes, weights, strict=True):
                if scale is not None:
                    weight *= scale[:, None].astype(weight.dtype)
                if minimum is not None:
                    weight += minimum[:, None].astype(weight.dtype)
                total += dot(xs[plane], weight)
            return total
        if minimum is not None:
            ones = jnp.ones((block_n, width), x_ref.dtype)
            total = multiply_add(sum(dot(xs[plane], ones) for plane in planes), flat(minimum), total)
        here = sum(dot(xs[plane], weight) for plane, weight in zip(planes, weights, strict=True))
        return multiply_add(here, flat(scale), total)

    def step(index, carry):
        sums, fetched = carry
        # A step ahead, since these small loads do not go through the ring.
        ahead = fetch(jnp.minimum(index + 1, units - 1))
        x_at = [index * unit + plane * width + lane for plane in range(unit // width)]
        xs = [_load(x_ref.at[row[:, None], at[None, :]], is_row, (block_m, width)) for at in x_at]
        words = [
            [values_ref[index, (start + weight_row)[:, None], (i * width + lane)[None, :]] for i in range(words_each)]
            for start in starts
        ]
        fetched, sums = iter(fetched), list(sums)
        for chunk in chunks:
            for i in range(len(starts)):
                sums[i] = add_chunk(sums[i], chunk, words[i], xs, fetched)
        return tuple(sums), ahead

    shape = (block_n, block_m) if swap else (block_m, block_n)
    first, last = split * units // splits, (split + 1) * units // splits
    sums, _ = lax.fori_loop(first, last, step, ((jnp.zeros(shape, jnp.float32),) * len(starts), fetch(first)))
    if scales_last:
        scales = (_scale_numbers(of_group(scales_ref, 0, start)) for start in starts)
        sums = [total * flat(scale) for total, scale in zip(sums, scales, strict=True)]
    if "tensor_scale" in small:
        ref = small["tensor_scale"]
        factors = (ref[0 * column if ref.shape[0] == 1 else start + weight_row, 0] for start in starts)
        sums = [total * flat(factor) for total, factor in zip(sums, factors, strict=True)]
    if "bias" in small:
        biases = (small["bias"][start + weight_row].astype(jnp.float32) for start in starts)
        sums = [total + flat(bias) for total, bias in zip(sums, biases, strict=True)]
    out = sums[0] if activation is None else ACTIVATIONS[activation](sums[0]) * sums[1]
    at = (row[None, :], column[:, None]) if swap else (row[:, None], column[None, :])
    place = out_ref.at[at] if len(out_ref.shape) == 2 else out_ref.at[split, *at]
    mask = jnp.broadcast_to((at[0] < rows) & (at[1] < columns), shape)
    pltriton.store(place, out.astype(out_ref.dtype), mask=mask)


def _scale_numbers(scales):
    if scales.dtype != jnp.float8_e4m3fn:
        return scale_numbers(scales)
    # Older GPUs have no conversion: with its sign and the rest moved to where float16 has them, a number is 256 times
    # too small.
    bits = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint16)
    bits = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256


def _load(at, mask, shape):
    if mask is None:
        return pltriton.load(at)
    return pltriton.load(at, mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), at.dtype))
