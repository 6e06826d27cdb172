"""What the Triton kernels of decode and prefill share: keys and values out of pages, scores, the online softmax.

Softmax is computed in powers of two, which is what the hardware has: the scale of the scores takes log2(e) in, and
statistics stay in that domain until the log-sum-exp is written.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pltriton, triton_call

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
    """

    scale: float
    soft_cap: float | None
    capability: tuple[int, int] | None


class Statistics(NamedTuple):
    """State of the online softmax: highest score and sum of each row, and what the values have come to."""

    highest: jax.Array
    total: jax.Array
    acc: jax.Array


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


def pool_views(pages, scales):
    """Keys, values and their scales as kernels take them: one row a key of a head."""
    head_dim = pages[0].shape[3]
    views = {name: x.reshape(-1, head_dim) for name, x in zip(("keys", "values"), pages, strict=True)}
    scale_views = zip(("key_scales", "value_scales"), scales, strict=True)
    return views | {name: None if x is None else x.reshape(-1) for name, x in scale_views}


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


def load_pools(refs, rows, head_dim, visible, dtype, features):
    """Tiles of keys and of values, each with its scales.

    Args:
      refs: the kernel's, with those of `pool_views`.
      rows: from `rows_of_step`.
      head_dim: columns of the pools.
      visible: which rows are read at all, or `None` for all; the others are 0.
      dtype: of the tiles.
      features: for what the GPU can convert.

    Returns:
      Twice `[rows, H]` and, for quantized pools, `[rows]`, else `None`.
    """
    columns = jnp.arange(padded(head_dim))
    mask = None if visible is None else visible[:, None]
    if head_dim < len(columns):
        inside = (columns < head_dim)[None, :]
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (rows.shape[0], len(columns)))

    def pool(name):
        tile = dequantized(load(refs[f"{name}s"].at[rows[:, None], columns[None, :]], mask), dtype, features)
        scales = refs.get(f"{name}_scales")
        return tile, None if scales is None else load(scales.at[rows], visible)

    return pool("key"), pool("value")


def dequantized(tile, dtype, features):
    """A tile of stored keys or values in the dtype of the product, before its scales."""
    if tile.dtype != jnp.float8_e4m3fn:
        return tile.astype(dtype)
    if features.capability is None or features.capability >= (8, 9):
        # By way of float32, because the hardware is slow at float16 to bfloat16.
        return tile.astype(jnp.float16).astype(jnp.float32).astype(dtype)
    # Sign and the seven other bits, moved to where float16 has them: 2 ** 8 too small for the difference in bias.
    bits = lax.bitcast_convert_type(tile, jnp.int8).astype(jnp.int16)
    half = lax.bitcast_convert_type((bits << 7) & jnp.int16(-0x4080), jnp.float16)
    return (half * jnp.float16(256)).astype(dtype)


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
      q: queries `[rows, H]`.
      keys: `[keys, H]` in the dtype of `q`, and their scales `[keys]` or `None`.
      slopes: of ALiBi, `[rows]`, or `None`.
      distance: key positions minus query positions; broadcasts to `[rows, keys]`.
      features: scale and cap.

    Returns:
      Scores, and a positive factor that is left to the exponential, where it costs nothing.
    """
    keys, key_scales = keys
    scores = dot(q, keys.T)
    if key_scales is not None:
        scores *= key_scales[None, :]
    if features.soft_cap is None and slopes is None and features.scale > 0:
        return scores, features.scale * LOG2E
    if features.soft_cap is None:
        scores *= features.scale * LOG2E
    elif q.dtype == jnp.float32:
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
      values: `[keys, H]`, finite everywhere, and their scales `[keys]` or `None`.
      features: for what the GPU can do.
    """
    values, scales = values
    highest = jnp.maximum(state.highest, jnp.max(scores, axis=1) * factor)
    weights = exp2(scores, factor, -highest[:, None], features)
    correction = exp2(state.highest, 1.0, -highest, features)
    total = state.total * correction + jnp.sum(weights, axis=1)
    if scales is not None:
        weights *= scales[None, :]
    acc = state.acc * correction[:, None] + dot(weights.astype(values.dtype), values)
    return Statistics(highest, total, acc)


def no_statistics(rows, head_dim):
    """The state before the first key."""
    return Statistics(
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, padded(head_dim)), jnp.float32),
    )


def finished(state, sinks):
    """Output and log-sum-exp (to base 2) of each row, with one more score without a value if there are `sinks`."""
    highest, total, acc = state
    if sinks is not None:
        sinks = sinks * LOG2E
        highest = jnp.maximum(highest, sinks)
        correction = jnp.exp2(state.highest - highest)
        total = total * correction + jnp.exp2(sinks - highest)
        acc = acc * correction[:, None]
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return acc / total[:, None], jnp.where(seen, highest + jnp.log(total) * LOG2E, -jnp.inf)
