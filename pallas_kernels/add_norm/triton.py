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
from pallas_kernels.add_norm.reference import pairwise_sum
from pallas_kernels.compat import pl, pltriton, triton_call

OP = "add_norm"
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


def add_norm(x, update, scale, bias, *, kind, eps, offset, multiplier, update_scale, update_bias, update_kind):
    """See `api.add_norm`; `x` is `[T, D]`, `update` `[s, T, D]` or `None`."""
    rows, width = x.shape
    block = pl.next_power_of_2(width)
    inputs = {"x": x, "scale": scale, "bias": bias, "update": update}
    inputs |= {"update_scale": update_scale, "update_bias": update_bias}
    inputs = {name: each for name, each in inputs.items() if each is not None}
    outputs = [name for name, is_one in (("sum", update is not None), ("normed", kind is not None)) if is_one]
    outs = triton_call(
        functools.partial(
            _kernel,
            names=(*inputs, *outputs),
            block=block,
            kind=kind,
            update_kind=update_kind,
            eps=eps,
            offset=offset,
            multiplier=multiplier,
        ),
        *inputs.values(),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * len(outputs),
        grid=(rows,),
        name=OP,
        num_warps=min(32, max(1, block // 128)) if block <= 8192 else 16,  # 32 have 64 registers a thread: too few
        num_stages=1,
    )
    # Without an update the sum is `x`, and without a norm the second result is the first.
    return outs[0] if update is not None else x, outs[-1]


def _kernel(*refs, names, block, kind, update_kind, eps, offset, multiplier):
    refs = dict(zip(names, refs, strict=True))
    row, column = pl.program_id(0), jnp.arange(block)
    width = refs["x"].shape[1]
    mask = None if block == width else column < width

    def load(name, *index):
        ref = refs[name]
        at = ref.at[*index, column]
        loaded = pltriton.load(at) if mask is None else pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))
        return loaded.astype(jnp.float32)

    def load_weights(*names):
        return [load(name) if name in refs else None for name in names]

    def normalize(x, weights, kind):
        scale, bias = weights
        if kind == "layer":
            x = x - jnp.sum(x) / width
            x = x if mask is None else jnp.where(mask, x, 0)  # what is past the row has no part in the variance
        x = x * lax.rsqrt(jnp.sum(x * x) / width + eps)
        if scale is not None:
            x = x * (scale + offset if offset else scale)
        return x if bias is None else x + bias

    # Weights come while a reduction waits for all warps; those of two norms at once would not fit in wide rows.
    wide = load("x", row)
    weights = load_weights("scale", "bias") if update_kind is None else None
    if "update" in refs:
        update_weights = load_weights("update_scale", "update_bias")
        update = pairwise_sum([load("update", part, row) for part in range(refs["update"].shape[0])])
        if update_kind is not None:
            update = normalize(update, update_weights, update_kind)
            weights = load_weights("scale", "bias")
        if multiplier != 1:
            update = update * multiplier
        total = (wide + update).astype(refs["sum"].dtype)
        pltriton.store(refs["sum"].at[row, column], total, mask=mask)
        wide = total.astype(jnp.float32)
    if kind is not None:
        normed = normalize(wide, weights, kind)
        pltriton.store(refs["normed"].at[row, column], normed.astype(refs["normed"].dtype), mask=mask)
