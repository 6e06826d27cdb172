"""Attention of prompts and chunks of prompts over paged keys, in Pallas-Triton.

A program takes a block of rows of one slot and one key head. A row is a query of one head: the heads that share the key
head stand beside each other, a token after the other, so that blocks are full for any number of them. Tiles of keys
that every row sees go through a loop with no masks, the others through a second one.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton
from pallas_kernels.ragged_paged_attention import triton_common as common
from pallas_kernels.ragged_paged_attention import triton_pools as pools
from pallas_kernels.ragged_paged_attention.blocks import num_query_blocks, query_blocks

SLOT, START, ROW, QUERIES, LENGTH, FIRST = range(6)


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of prefill.

    Attributes:
      rows: queries times heads of a program; a power of two.
      keys: keys a step takes; a power of two.
      num_warps: warps a program.
      num_stages: depth of software pipelining.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as far as it is compiled in.

    Attributes:
      window: how many, its own included; `None` for no such limit.
      causal: whether none after its own.
      has_starts: whether those before a first key of its slot may be hidden.
    """

    window: int | None
    causal: bool
    has_starts: bool

    @property
    def has_begin(self) -> bool:
        """Whether a query may not see the first key of its slot."""
        return self.window is not None or self.has_starts


def plan_of_blocks(cu_q_lens, kv_lens, kv_starts, tokens, group, rows):
    """What each program works on, `int32[6, B]`.

    Its slot, the first of its rows in the slot, the slot's first row of `q` and its number of queries, its number of
    keys and the first of them that is seen. Slots with one query have no program. The padding at the end of `q` is
    one more slot, `S`, that sees nothing; programs with nothing to do have no queries.
    """
    slots = kv_lens.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    q_lens = jnp.append(jnp.where(q_lens > 1, q_lens, 0), tokens - cu_q_lens[-1])
    num_blocks = num_query_blocks(tokens * group, min(slots, tokens // 2) + 1, rows)
    slot, start = query_blocks(q_lens * group, rows, num_blocks)
    first = jnp.zeros_like(kv_lens) if kv_starts is None else kv_starts
    of_slots = (cu_q_lens, q_lens, kv_lens, first)
    return jnp.stack([slot, start, *(x.at[slot].get(mode="fill", fill_value=0) for x in of_slots)])


def attend(q, pages, scales, page_table, plan, slopes, sinks, features, mask, config):
    """Attention of slots with more than one query; rows of slots with one are left unwritten.

    Args:
      q: `[T, N, H]`.
      pages: keys and values, each `[P, K, p, H]`.
      scales: of keys and of values, each `float32[P, K, p]` or `None`.
      page_table: `int32[S, M]`.
      plan: from `plan_of_blocks`.
      slopes: of ALiBi, `[N]` or `None`.
      sinks: `[N]` or `None`.
      features: what else is compiled in.
      mask: which keys are seen.
      config: block sizes.

    Returns:
      Output `[T, N, H]` and log-sum-exp `float32[T, N]`; padding is 0 and minus infinity.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = pages[0].shape[1]
    return common.call_kernel(
        _kernel,
        {"plan": plan, "page_table": page_table, "q": q}
        | pools.views(pages, scales)
        | {"slopes": slopes, "sinks": sinks},
        {
            "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "lse": jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        },
        {},
        static={
            "shape": pages[0].shape,
            "group": heads // kv_heads,
            "features": features,
            "mask": mask,
            "config": config,
        },
        grid=(kv_heads, plan.shape[1]),
        name="paged_prefill",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _visible_range(position, first_key, length, mask):
    """First key that a query at a position sees, and the end of those it sees."""
    begin = first_key if mask.window is None else jnp.maximum(first_key, position - mask.window + 1)
    if mask.causal:
        return begin, jnp.minimum(length, position + 1)
    return begin, length if mask.window is None else jnp.minimum(length, position + mask.window)


def _kernel(refs, *, shape, group, features, mask, config):
    plan, kv_head = refs["plan"], pl.program_id(0)
    # A slot's last blocks see most keys if causal: they go first, so that the GPU does not wait for them at the end.
    block = plan.shape[1] - 1 - pl.program_id(1)
    slot, start, first_row, queries, length, first_key = (plan[i, block] for i in range(6))
    columns = jnp.arange(pools.width(shape[3], features.stored))

    def rows_from(start, first_row, queries):
        index = start + jnp.arange(config.rows)
        token, head = lax.div(index, group), kv_head * group + lax.rem(index, group)
        inside = token < queries
        tile = (first_row + token[:, None], head[:, None], columns[None, :])
        return token, head, inside, tile, inside[:, None] & (columns < shape[3])[None, :]

    @pl.when(queries > 0)
    def _():
        token, head, inside, tile, inside_tile = rows_from(start, first_row, queries)
        q = common.load(refs["q"].at[tile], inside_tile)
        slopes = common.load_of_heads(refs, "slopes", head, inside)

        def visible_range(token):
            return _visible_range(length - queries + token, first_key, length, mask)

        begin, end = (jnp.broadcast_to(x, token.shape) for x in visible_range(token))
        lowest = visible_range(lax.div(start, group))
        highest = visible_range(jnp.minimum(lax.div(start + config.rows - 1, group), queries - 1))
        # Tiles that any row sees, and among them those that all rows see the whole of.
        some, some_end = lax.div(lowest[0], config.keys), pl.cdiv(highest[1], config.keys)
        full = jnp.clip(pl.cdiv(highest[0], config.keys), some, some_end)
        full_end = jnp.clip(lax.div(lowest[1], config.keys), full, some_end)

        def pages_of(i):
            return common.pages_of_step(refs["page_table"], slot, i, config.keys, shape[2], highest[1])

        def step(i, carry, masked):
            pages, state = carry
            place = i * config.keys + jnp.arange(config.keys)
            # What lies in no row's range may have no page, or hold NaN.
            loaded = (place >= lowest[0]) & (place < highest[1]) if masked else None
            rows = common.rows_of_step(pages, kv_head, i, config.keys, shape)
            keys, values = pools.load(refs, rows, shape[3], loaded, q.dtype, features, whole=True)
            distance = place[None, :] - (length - queries + token)[:, None]
            scores, factor = common.scores_of([q], keys, slopes, distance, features)
            if masked:
                visible = place[None, :] < end[:, None]
                if mask.has_begin:
                    visible &= place[None, :] >= begin[:, None]
                scores = jnp.where(visible, scores, -jnp.inf)
            return pages_of(i + 1), common.softmax_step(state, scores, factor, values, features)

        masked, unmasked = functools.partial(step, masked=True), functools.partial(step, masked=False)
        carry = pages_of(some), common.no_statistics(config.rows, [columns])
        if mask.has_begin:
            carry = lax.fori_loop(some, full, masked, carry)
        carry = lax.fori_loop(full, full_end, unmasked, carry)
        _, state = lax.fori_loop(full_end, some_end, masked, carry)

        # Volatile loads, so that these addresses are computed anew: kept through the loops they would spill.
        again = (pltriton.load(plan.at[jnp.int32(i), block], volatile=True) for i in (START, ROW, QUERIES))
        _, head, inside, tile, inside_tile = rows_from(*again)
        sinks = common.load_of_heads(refs, "sinks", head, inside)
        out, lse = common.finished(state.highest, state.total, state.acc[0], sinks)
        lse = jnp.where(slot < refs["page_table"].shape[0], lse * common.LN2, -jnp.inf)
        pltriton.store(refs["out"].at[tile], out.astype(q.dtype), mask=inside_tile)
        pltriton.store(refs["lse"].at[tile[0][:, 0], head], lse, mask=inside)
