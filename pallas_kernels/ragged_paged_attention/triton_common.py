"""What the Triton kernels of decode and prefill share: keys and values out of pages, scores, the online softmax.

Softmax is computed in powers of two, which is what the hardware has: the scale of the scores takes log2(e) in, and
statistics stay in that domain until the log-sum-exp is written.
"""

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pltriton, triton_call
from pallas_kernels.ragged_paged_attention.quantized import LIFT

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LOWEST = -1e30  # finite, so that a row with nothing visible yet stays free of NaN


@dataclasses.dataclass(frozen=True)
class Features:
    """What is compiled into a kernel.

    Attributes:
      scale: of the products of queries and keys.
      soft_cap: limit of the scores, or `None`.
      capability: of the GPU that is compiled for, `None` where kernels are interpreted.
      stored: dtype of the pages.
    """

    scale: float
    soft_cap: float | None
    capability: tuple[int, int] | None
    stored: jnp.dtype


class Statistics(NamedTuple):
    """State of the online softmax: highest score and sum of each row, and what each part of the values has come to."""

    highest: jax.Array
    total: jax.Array
    acc: tuple[jax.Array, ...]


def call_kernel(kernel, inputs, outputs, into, static, **options):
    """Run a Triton kernel that takes its refs by name.

    Args:
      kernel: takes the refs of all inputs that are given, and of the outputs, in a dictionary, then `static`.
      inputs: arrays by name; `None` where one is not given.
      outputs: shape and dtype of each result by name.
      into: for results by name, the array whose memory and contents they take over.
      static: keyword arguments of the kernel.
      **options: those of `triton_call`.

    Returns:
      The results, in the order of `outputs`.
    """
    given = {name: array for name, array in inputs.items() if array is not None}
    taken = {f"old_{name}": array for name, array in into.items()}
    names = [*given, *taken, *outputs]

    def with_names(*refs):
        kernel(dict(zip(names, refs, strict=True)), **static)

    return triton_call(
        with_names,
        *given.values(),
        *taken.values(),
        out_shape=list(outputs.values()),
        input_output_aliases={len(given) + i: list(outputs).index(name) for i, name in enumerate(into)},
        **options,
    )


def padded(size):
    """The power of two that a tile's side needs; products want 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def pages_of_step(page_table, slot, step, keys, page_size, end):
    """Pages of a step of `keys` keys: one where a page holds them all, else one for each key; 0 from key `end` on.

    Loops load them a step ahead. Loaded where they are needed they would take up all of the compiler's pipelining: the
    keys and values themselves would be waited for in every step.
    """
    bits = page_size.bit_length() - 1
    if keys <= page_size:
        return load(page_table.at[slot, step * keys >> bits], step * keys < end)
    place = step * keys + jnp.arange(keys)
    return load(page_table.at[slot, place >> bits], place < end)


def rows_of_step(pages, kv_head, step, keys, shape):
    """Rows of a step's keys in pools viewed as `[P * K * p, H]`, given the pages of the step and the pools' shape."""
    _, kv_heads, page_size, _ = shape
    page_row = (pages * kv_heads + kv_head) * page_size
    if keys <= page_size:
        return page_row + (step * keys & (page_size - 1)) + jnp.arange(keys)
    return page_row + (jnp.arange(keys) & (page_size - 1))


def load(ref, mask=None):
    """Load what an indexed ref names, 0 where `mask` is false; `None` is a mask that is true everywhere."""
    if mask is None:
        return pltriton.load(ref)
    return pltriton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def load_of_heads(refs, name, head, inside):
    """What an `[N]` input holds for some heads, in float32; `None` if the kernel has no such input."""
    return load(refs[name].at[head], inside).astype(jnp.float32) if name in refs else None


def dot(a, b):
    """Product of two tiles in float32; of float32 tiles at full precision, not as TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def exp2(x, factor, offset, features):
    """`2 ** (x * factor + offset)` in two instructions: JAX's own takes four more, for results too small to matter."""
    if features.capability is None:
        return jnp.exp2(x * factor + offset)
    return _assembled("fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t;", x, factor, offset)


def _capped(x, factor, cap, features):
    """`cap * tanh(x * factor)` in five instructions, with an error of the last bits of `cap`."""
    if features.capability is None:
        return cap - 2 * cap / (jnp.exp2(x * (2 * LOG2E * factor)) + 1)
    power = "mul.ftz.f32 t, $1, $2; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000;"  # and 1.0
    code = power + "rcp.approx.ftz.f32 t, t; fma.rn.ftz.f32 $0, t, $3, $4;"
    return _assembled(code, x, 2 * LOG2E * factor, -2 * cap, cap)


def _assembled(code, x, *operands):
    tiles = [jnp.broadcast_to(jnp.asarray(operand, jnp.float32), x.shape) for operand in operands]
    (result,) = pltriton.elementwise_inline_asm(
        f"{{.reg .f32 t; {code}}}",
        args=[x, *tiles],
        constraints="=f" + ",f" * (1 + len(tiles)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def scores_of(q, keys, slopes, distance, features):
    """Scores of a tile, and the factor that brings them into the domain of powers of two.

    Args:
      q: parts of the queries, `[rows, .]` each.
      keys: parts of the keys, `[keys, .]` each in the dtype of `q`, and their scales `[keys]` or `None`.
      slopes: of ALiBi, `[rows]`, or `None`.
      distance: key positions minus query positions; broadcasts to `[rows, keys]`.
      features: scale and cap.

    Returns:
      Scores, and a positive factor that is left to the exponential, where it costs nothing.
    """
    keys, key_scales = keys
    scores = functools.reduce(operator.add, [dot(mine, theirs.T) for mine, theirs in zip(q, keys, strict=True)])
    if key_scales is not None:
        scores *= key_scales[None, :]
    if features.soft_cap is None and slopes is None and features.scale > 0:
        return scores, features.scale * LOG2E
    if features.soft_cap is None:
        scores *= features.scale * LOG2E
    elif q[0].dtype == jnp.float32:
        scores = jnp.tanh(scores * (features.scale / features.soft_cap)) * (features.soft_cap * LOG2E)
    else:
        scores = _capped(scores, features.scale / features.soft_cap, features.soft_cap * LOG2E, features)
    if slopes is not None:
        scores += (slopes * LOG2E)[:, None] * distance.astype(jnp.float32)
    return scores, 1.0


def softmax_step(state, scores, factor, values, features):
    """One step of the online softmax (arXiv 2205.14135) over a tile of keys.

    Args:
      state: after the tiles before.
      scores: `[rows, keys]`, minus infinity where a key is not visible.
      factor: what is still to be multiplied with the scores.
      values: their parts, `[keys, .]` each, finite everywhere, and their scales `[keys]` or `None`.
      features: for what the GPU can do.
    """
    values, scales = values
    new = jnp.max(scores, axis=1) * factor
    highest = jnp.maximum(state.highest, new - LIFT[features.stored] if scales is not None else new)
    weights = exp2(scores, factor, -highest[:, None], features)
    correction = exp2(state.highest, 1.0, -highest, features)
    total = state.total * correction + jnp.sum(weights, axis=1)
    if scales is not None:
        weights *= scales[None, :]
    weights = weights.astype(values[0].dtype)
    acc = tuple(old * correction[:, None] + dot(weights, part) for old, part in zip(state.acc, values, strict=True))
    return Statistics(highest, total, acc)


def no_statistics(rows, columns):
    """The state before the first key, of parts with these columns."""
    acc = tuple(jnp.zeros((rows, len(part)), jnp.float32) for part in columns)
    return Statistics(jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), acc)


def finished(highest, total, acc, sinks):
    """Output and log-sum-exp (to base 2) of each row, with one more score without a value if there are `sinks`."""
    if sinks is not None:
        sinks = sinks * LOG2E
        before, highest = highest, jnp.maximum(highest, sinks)
        correction = jnp.exp2(before - highest)
        total = total * correction + jnp.exp2(sinks - highest)
        acc = acc * correction[:, None]
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return acc / total[:, None], jnp.where(seen, highest + jnp.log(total) * LOG2E, -jnp.inf)
