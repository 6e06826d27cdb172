"""The product as one Pallas-Triton launch that streams the weight once.

A program owns a tile of output columns, all rows, and a range of the contracted axis. It is bound by bytes, so all that
matters is how many of them are in flight: tiles of the weight come through a ring in shared memory, several ahead of
the one that the tensor cores work on, and there are about as many programs as multiprocessors, or more. The rows are
few and stay in the L2 cache, from where every program reads them again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.few_row_matmul.api import MAX_ROWS

OP = "few_row_matmul"
KIB = 2**10
WEIGHT_TILE = 16 * KIB  # bytes that a program loads at a time; two to three such are in flight
IN_FLIGHT = 48 * KIB  # bytes of the weight that a program should have under way
X_TILE = 8 * KIB
SHARED = 96 * KIB  # shared memory that every GPU from 8.0 on gives a program
FILL = 0.8  # a product is split until this many of the multiprocessors have a program


def refusals(x, weight, gpu):
    """Why the kernel can not run."""
    reasons = dispatch.triton_refusals(gpu)
    if not 1 <= x.shape[0] <= MAX_ROWS:
        reasons.append(f"x has {x.shape[0]} rows; the kernel is for 1 to {MAX_ROWS}")
    if x.dtype != weight.dtype:
        reasons.append(f"x is {x.dtype} and the weight {weight.dtype}; the kernel needs both alike")
    if not x.shape[1] or not weight.shape[0]:
        reasons.append(f"weight {weight.shape} is empty, and Triton can not launch an empty grid")
    if weight.size > 2**31:
        reasons.append(f"weight {weight.shape} has more elements than 32-bit offsets reach")
    return reasons


def block_sizes(rows, columns, inner, *, gated, partial, dtype, gpu):
    """Sizes where the table is silent.

    The wider the tile of columns, the less of `x` is read from L2: a quarter of the weight's bytes where the tile has
    four times as many rows of the weight as `x` has rows. With `partial`, the multiprocessors are filled by splits,
    and by narrower tiles only where that would take too many; without, by narrower tiles alone, since adding up parts
    would take a second kernel.

    Args:
      rows: of `x`.
      columns: of the result.
      inner: length of the contracted axis.
      gated: whether a program has a tile of gate rows and one of up rows.
      partial: whether the contracted axis may be split.
      dtype: of `x` and the weight.
      gpu: what is compiled for, or `None`.

    Returns:
      `block_n`, columns of a program; `block_k`, length of a step; `splits`; `num_warps`; `num_stages`.
    """
    size, block_m, tiles = jnp.dtype(dtype).itemsize, _block_m(rows), 2 if gated else 1
    needed = FILL * (8 if gpu is None else gpu.cores)
    # Float32 does without the tensor cores, and threads hold whole slices of its operands.
    widest, shortest, longest = (128, 64, 256) if size == 2 else (32, 32, 32)
    if partial:
        widest = min(widest, 4 * block_m)
    # Parts are written and read again: each at most an eighth of the weight's bytes, or four parts.
    most_splits = min(8, max(4, inner // (16 * block_m))) if partial else 1

    block_n = widest // tiles
    while True:
        block_k = min(longest, WEIGHT_TILE // (size * block_n * tiles), X_TILE // (size * block_m))
        while block_k > shortest and inner % block_k:
            block_k //= 2
        blocks = pl.cdiv(inner, block_k)
        splits = [count for count in range(1, most_splits + 1) if blocks % count == 0]
        enough = [count for count in splits if pl.cdiv(columns, block_n) * count >= needed]
        if enough or block_n == 16:
            break
        block_n //= 2

    count = enough[0] if enough else splits[-1]
    weight_tile = size * block_n * block_k * tiles
    stages = min(6, 1 + pl.cdiv(IN_FLIGHT, weight_tile), 1 + blocks // count)
    stages = min(stages, SHARED // (weight_tile + size * block_m * block_k))
    return {"block_n": block_n, "block_k": block_k, "splits": count, "num_warps": 4, "num_stages": stages}


def _block_m(rows):
    return max(16, pl.next_power_of_2(rows))


def matmul(x, weight, *, bias, activation, partial, config=None):
    """See `api.few_row_matmul`.

    `config` is what `block_sizes` returns. By default it comes from the table of tuned sizes, by `block_m` (rows
    rounded up to 16, 32 or 64), `columns` of the result, `inner`, `gated`, `partial` and `dtype`.
    """
    rows, inner = x.shape
    gated = activation is not None
    columns = weight.shape[0] // (2 if gated else 1)
    gpu = dispatch.current_gpu()
    shape = {"columns": columns, "inner": inner, "gated": gated, "partial": partial}
    config = (
        config
        or dispatch.tuned(OP, gpu, block_m=_block_m(rows), **shape, dtype=str(x.dtype))
        or block_sizes(rows, **shape, dtype=x.dtype, gpu=gpu)
    )
    splits, block_k = config["splits"], config["block_k"]
    blocks = pl.cdiv(pl.cdiv(inner, block_k), splits)
    return triton_call(
        functools.partial(
            _kernel,
            block_m=_block_m(rows),
            block_n=config["block_n"],
            block_k=block_k,
            blocks=blocks,
            is_ragged=splits * blocks * block_k != inner,
            activation=activation,
        ),
        *(each for each in (x, weight, bias) if each is not None),
        out_shape=jax.ShapeDtypeStruct(
            (splits, rows, columns) if partial else (rows, columns), jnp.float32 if partial else x.dtype
        ),
        grid=(pl.cdiv(columns, config["block_n"]), splits),
        name=OP,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _kernel(x_ref, weight_ref, *refs, block_m, block_n, block_k, blocks, is_ragged, activation):
    *bias_ref, out_ref = refs
    (rows, inner), columns = x_ref.shape, out_ref.shape[-1]
    split, row = pl.program_id(1), jnp.arange(block_m)
    column = pl.program_id(0) * block_n + jnp.arange(block_n)
    # Past the last column, the last one again: loads of the weight need no mask.
    weight_row = column if columns % block_n == 0 else jnp.minimum(column, columns - 1)
    starts = (0,) if activation is None else (0, columns)
    is_row = None if rows == block_m else row[:, None] < rows
    is_column = None if columns % block_n == 0 else column[None, :] < columns
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(index, sums):
        k = (split * blocks + index) * block_k + jnp.arange(block_k)
        is_inner = k[None, :] < inner if is_ragged else None
        x = _load(x_ref, row, k, _mask((block_m, block_k), is_row, is_inner))
        tiles = [_load(weight_ref, start + weight_row, k, _mask((block_n, block_k), is_inner)) for start in starts]
        contract = (((1,), (1,)), ((), ()))
        return tuple(
            total + lax.dot_general(x, tile, contract, precision=precision, preferred_element_type=jnp.float32)
            for total, tile in zip(sums, tiles, strict=True)
        )

    sums = lax.fori_loop(0, blocks, step, (jnp.zeros((block_m, block_n), jnp.float32),) * len(starts))
    if bias_ref:
        biases = (bias_ref[0][start + weight_row].astype(jnp.float32) for start in starts)
        sums = [total + bias[None, :] for total, bias in zip(sums, biases, strict=True)]
    out = sums[0] if activation is None else ACTIVATIONS[activation](sums[0]) * sums[1]
    at = (row[:, None], column[None, :])
    place = out_ref.at[at] if len(out_ref.shape) == 2 else out_ref.at[split, *at]
    pltriton.store(place, out.astype(out_ref.dtype), mask=_mask(out.shape, is_row, is_column))


def _mask(shape, *conditions):
    conditions = [each for each in conditions if each is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), shape) if conditions else None


def _load(ref, row, column, mask):
    at = ref.at[row[:, None], column[None, :]]
    return pltriton.load(at) if mask is None else pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


# Triton has no erf. This is erfc(z) * exp(z * z) for z >= 0 as a polynomial in t = 1 / (1 + ERFC_POLE * z) without its
# constant term: least squares over [0, 12], reweighted until the largest relative error was least, 2e-8.
ERFC_POLE = 0.3
ERFC = (
    0.169189306,
    0.170691761,
    0.148515222,
    0.214205488,
    -0.0928839094,
    0.545052953,
    -0.509849677,
    0.484340205,
    -0.129261357,
)


def _gelu(x):
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + ERFC_POLE * z)
    half_tail = 0.5 * jnp.exp(-z * z) * t * functools.reduce(lambda total, each: total * t + each, ERFC[::-1])
    return x * jnp.where(x < 0, half_tail, 1 - half_tail)


def _logistic(x):
    return 1 / (1 + jnp.exp(-x))


def _gelu_tanh(x):
    # (1 + tanh(y)) / 2 is the logistic function of 2 * y.
    return x * _logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


ACTIVATIONS = {
    "silu": lambda x: x * _logistic(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _logistic(1.702 * x),
    "relu": lambda x: jnp.maximum(x, 0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0)),
}
