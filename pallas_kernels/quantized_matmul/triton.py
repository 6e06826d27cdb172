"""The product as one Pallas-Triton launch that streams the packed weight once for each tile of rows.

A program owns a tile of columns, a tile of rows, and a range of the contracted axis, and takes a unit of it at a time:
words of the weight come through a ring in shared memory to the registers in the order of the tensor cores, are decoded
there two at a time, and multiplied by the rows, which come from the L2 cache. With many rows the weight is the left
operand: then Hopper's tensor cores read it from registers, where it was decoded, and not from shared memory.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.few_row_matmul.triton import ACTIVATIONS
from pallas_kernels.quantized_matmul.api import MAX_ROWS
from pallas_kernels.quantized_matmul.decode import DTYPES
from pallas_kernels.quantized_matmul.triton_tile import sums_of_products

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
    refs = dict(zip(names, refs, strict=True)) | {"x": x_ref, "values": values_ref, "scales": scales_ref}
    rows, columns, units = x_ref.shape[0], out_ref.shape[-1], values_ref.shape[0]
    row, split = pl.program_id(0) * block_m + jnp.arange(block_m), pl.program_id(2)
    column = pl.program_id(1) * block_n + jnp.arange(block_n)
    # Past the last column, the last one again: loads of the weight need no mask.
    weight_row = column if columns % block_n == 0 else jnp.minimum(column, columns - 1)
    starts = (0,) if activation is None else (0, columns)
    is_row = None if rows % block_m == 0 else row[:, None] < rows

    def load_x(inner):
        return _load(x_ref.at[row[:, None], inner[None, :]], is_row, (block_m, inner.shape[0]))

    sums = sums_of_products(
        refs,
        load_x,
        weight_row,
        starts,
        format=format,
        block_m=block_m,
        swap=swap,
        steps=(split * units // splits, (split + 1) * units // splits),
        least_group=2 * block_m * len(starts),
    )
    if "bias" in refs:
        biases = (refs["bias"][start + weight_row].astype(jnp.float32) for start in starts)
        biases = (bias[:, None] if swap else bias[None, :] for bias in biases)
        sums = [total + bias for total, bias in zip(sums, biases, strict=True)]
    out = sums[0] if activation is None else ACTIVATIONS[activation](sums[0]) * sums[1]
    at = (row[None, :], column[:, None]) if swap else (row[:, None], column[None, :])
    place = out_ref.at[at] if len(out_ref.shape) == 2 else out_ref.at[split, *at]
    mask = jnp.broadcast_to((at[0] < rows) & (at[1] < columns), out.shape)
    pltriton.store(place, out.astype(out_ref.dtype), mask=mask)


def _load(at, mask, shape):
    if mask is None:
        return pltriton.load(at)
    return pltriton.load(at, mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), at.dtype))
