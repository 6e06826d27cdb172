"""Residual and norm as one Pallas-Triton launch, a program a row.

Few rows leave nothing to hide latency behind but the row itself. With four elements a thread its loads fit in the
registers that the assembler likes to use, so it issues them together; with eight it waits for memory three times. The
sum stays in registers between its store and its norm.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm.reference import pairwise_sum
from pallas_kernels.compat import pl, pltriton, triton_call

OP = "add_rms_norm"
MAX_WIDTH = 16384  # 32 elements a thread


def refusals(x, update, gpu):
    """Why the kernel can not run on `x[T, D]` and `update[s, T, D]`."""
    reasons = dispatch.triton_refusals(gpu)
    if x.shape[1] > MAX_WIDTH:
        reasons.append(f"rows of {x.shape[1]} are longer than {MAX_WIDTH}, what a program holds")
    if not x.size:
        reasons.append(f"x {x.shape} is empty, and Triton can not launch an empty grid")
    if max(x.size, 0 if update is None else update.size) > 2**31:
        reasons.append("there are more elements than 32-bit offsets reach")
    return reasons


def add_rms_norm(x, update, scale, *, eps):
    """See `api.add_rms_norm`; `x` is `[T, D]`, `update` `[s, T, D]` or `None`."""
    rows, width = x.shape
    block = pl.next_power_of_2(width)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outs = triton_call(
        functools.partial(_kernel, block=block, eps=eps),
        *((x, scale) if update is None else (x, scale, update)),
        out_shape=[out] if update is None else [out, out],
        grid=(rows,),
        name=OP,
        num_warps=min(32, max(1, block // 128)) if block <= 8192 else 16,  # 32 have 64 registers a thread: too few
        num_stages=1,
    )
    return (x, *outs) if update is None else tuple(outs)


def _kernel(x_ref, scale_ref, *refs, block, eps):
    *refs, normed_ref = refs
    row, column = pl.program_id(0), jnp.arange(block)
    width = x_ref.shape[1]
    mask = None if block == width else column < width

    def load(ref, *index):
        at = ref.at[*index, column]
        loaded = pltriton.load(at) if mask is None else pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))
        return loaded.astype(jnp.float32)

    wide, scale = load(x_ref, row), load(scale_ref)
    if refs:
        update_ref, sum_ref = refs
        parts = [load(update_ref, part, row) for part in range(update_ref.shape[0])]
        total = (wide + pairwise_sum(parts)).astype(sum_ref.dtype)
        pltriton.store(sum_ref.at[row, column], total, mask=mask)
        wide = total.astype(jnp.float32)
    factor = lax.rsqrt(jnp.sum(wide * wide) / width + eps)
    pltriton.store(normed_ref.at[row, column], (wide * factor * scale).astype(normed_ref.dtype), mask=mask)
