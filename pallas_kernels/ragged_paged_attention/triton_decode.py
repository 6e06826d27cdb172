"""Attention of single queries over paged keys: flash-decoding (split-K) in Pallas-Triton, bound by memory.

A program takes one query, the heads that share a key head (or a block of them), and one of the even parts that the
keys of that query are cut into, so that a few long sequences fill the GPU as well as many short ones. What the parts
found is merged by log-sum-exp in float32 by a second, small kernel; where one part is enough there is none.

Sources: FlashAttention (arXiv 2205.14135); Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton
from pallas_kernels.ragged_paged_attention import triton_common as common
from pallas_kernels.ragged_paged_attention import triton_pools as pools

ROW, SLOT, FIRST, END = range(4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of decode.

    Attributes:
      keys: keys a step takes; a power of two.
      group_rows: query heads a program takes; a power of two, at least 16.
      splits: parts that the keys of a query are cut into.
      num_warps: warps a program.
      num_stages: depth of software pipelining.
    """

    keys: int
    group_rows: int
    splits: int
    num_warps: int
    num_stages: int


def plan_of_rows(cu_q_lens, kv_lens, kv_starts, window, tokens):
    """Plan of a batch in which no slot has more than one query: a program for each row, padding included."""
    row = jnp.arange(tokens, dtype=jnp.int32)
    slot = jnp.sum(row[:, None] >= cu_q_lens[None, 1:], axis=1, dtype=jnp.int32)
    first, end = (x.at[slot].get(mode="fill", fill_value=0) for x in _visible_range(kv_lens, kv_starts, window))
    return jnp.stack([row, slot, first, end])


def plan_of_slots(cu_q_lens, kv_lens, kv_starts, window):
    """Plan of a mixed batch: a program for each slot, with nothing to do where it has not just one query."""
    slots = kv_lens.shape[0]
    single = cu_q_lens[1:] - cu_q_lens[:-1] == 1
    slot = jnp.where(single, jnp.arange(slots, dtype=jnp.int32), slots)
    first, end = (jnp.where(single, x, 0) for x in _visible_range(kv_lens, kv_starts, window))
    return jnp.stack([cu_q_lens[:-1], slot, first, end])


def _visible_range(kv_lens, kv_starts, window):
    # A slot's only query stands at its last key.
    first = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    return first if kv_starts is None else jnp.maximum(first, kv_starts), kv_lens


def attend(q, pages, scales, page_table, plan, slopes, sinks, features, config, into=None):
    """Attention of single queries.

    Args:
      q: `[T, N, H]`.
      pages: keys and values, each `[P, K, p, H]`.
      scales: of keys and of values, each `float32[P, K, p]` or `None`.
      page_table: `int32[S, M]`.
      plan: `int32[4, G]`: of each program its row of `q`, its slot (`S` for none), its first key and where they end.
      slopes: of ALiBi, `[N]` or `None`.
      sinks: `[N]` or `None`.
      features: what else is compiled in.
      config: block sizes.
      into: output and log-sum-exp that the result is written into, in place; programs with no slot write nothing.
        Without it the plan must have every row of `q`, and rows with no slot come out 0 and minus infinity.

    Returns:
      Output `[T, N, H]` and log-sum-exp `float32[T, N]`.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = pages[0].shape[1]
    group = heads // kv_heads
    blocks = pl.cdiv(group, config.group_rows)
    programs = plan.shape[1]
    whole = config.splits == 1

    result = {
        "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
    }
    taken = {} if into is None else dict(zip(result, into, strict=True))
    parts = {
        "parts": jax.ShapeDtypeStruct((programs, config.splits, heads, head_dim), jnp.float32),
        "parts_lse": jax.ShapeDtypeStruct((programs, config.splits, heads), jnp.float32),
    }
    static = {"slots": page_table.shape[0], "head_dim": head_dim, "config": config, "keep": into is not None}
    found = common.call_kernel(
        _attend_kernel,
        {"plan": plan, "page_table": page_table, "q": q}
        | pools.views(pages, scales)
        | {"slopes": slopes, "sinks": sinks if whole else None},
        result if whole else parts,
        taken if whole else {},
        static=static | {"shape": pages[0].shape, "group": group, "blocks": blocks, "features": features},
        grid=(programs, kv_heads * blocks, config.splits),
        name="paged_decode",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if whole:
        return found
    return common.call_kernel(
        _merge_kernel,
        {"plan": plan, "parts": found[0], "parts_lse": found[1], "sinks": sinks},
        result,
        taken,
        static=static,
        grid=(programs, heads),
        name="paged_decode_merge",
        num_warps=max(1, min(8, common.padded(head_dim) * _padded_splits(config) // 1024)),
        num_stages=1,
    )


def _padded_splits(config):
    return 1 << (config.splits - 1).bit_length()


def _split(plan, program, config):
    """First step of a query's keys, the end, and how many of its steps a part has."""
    first = lax.div(plan[FIRST, program], config.keys)
    end = pl.cdiv(plan[END, program], config.keys)
    return first, end, pl.cdiv(jnp.maximum(end - first, 0), config.splits)


def _attend_kernel(refs, *, slots, head_dim, config, keep, shape, group, blocks, features):
    program, split = pl.program_id(0), pl.program_id(2)
    kv_head, block = lax.div(pl.program_id(1), blocks), lax.rem(pl.program_id(1), blocks)
    plan = refs["plan"]
    row, slot, first_key, end_key = (plan[i, program] for i in (ROW, SLOT, FIRST, END))
    first, end, steps = _split(plan, program, config)
    first += split * steps
    end = jnp.minimum(first + steps, end)
    is_needed = first < end if config.splits > 1 else (slot < slots) | (not keep)

    @pl.when(is_needed)
    def _():
        member = block * config.group_rows + jnp.arange(config.group_rows)
        inside = member < group
        head = kv_head * group + member
        columns = pools.columns_of(head_dim, features.stored)
        q = [
            common.load(refs["q"].at[row, head[:, None], part[None, :]], inside[:, None] & (part < head_dim)[None, :])
            for part in columns
        ]
        slopes = common.load_of_heads(refs, "slopes", head, inside)

        def pages_of(i):
            return common.pages_of_step(refs["page_table"], slot, i, config.keys, shape[2], end_key)

        def step(i, carry):
            pages, state = carry
            place = i * config.keys + jnp.arange(config.keys)
            visible = (place >= first_key) & (place < end_key)
            rows = common.rows_of_step(pages, kv_head, i, config.keys, shape)
            keys, values = pools.load(refs, rows, head_dim, visible, refs["q"].dtype, features)
            distance = (place - (end_key - 1))[None, :]
            scores, factor = common.scores_of(q, keys, slopes, distance, features)
            scores = jnp.where(visible[None, :], scores, -jnp.inf)
            return pages_of(i + 1), common.softmax_step(state, scores, factor, values, features)

        state = common.no_statistics(config.group_rows, columns)
        _, state = lax.fori_loop(first, end, step, (pages_of(first), state))
        sinks = common.load_of_heads(refs, "sinks", head, inside)
        out, lse = common.finished(state.highest, state.total, pools.interleaved(state.acc), sinks)
        columns = jnp.arange(out.shape[1])[None, :]
        inside_tile = inside[:, None] & (columns < head_dim)
        if config.splits > 1:
            pltriton.store(refs["parts"].at[program, split, head[:, None], columns], out, mask=inside_tile)
            pltriton.store(refs["parts_lse"].at[program, split, head], lse, mask=inside)
        else:
            lse = jnp.where(slot < slots, lse * common.LN2, -jnp.inf)
            pltriton.store(refs["out"].at[row, head[:, None], columns], out.astype(refs["out"].dtype), mask=inside_tile)
            pltriton.store(refs["lse"].at[row, head], lse, mask=inside)


def _merge_kernel(refs, *, slots, head_dim, config, keep):
    program, head = pl.program_id(0), pl.program_id(1)
    plan = refs["plan"]
    row, slot = plan[ROW, program], plan[SLOT, program]

    @pl.when((slot < slots) | (not keep))
    def _():
        first, end, steps = _split(plan, program, config)
        split = jnp.arange(_padded_splits(config))
        is_written = split * steps < end - first
        columns = jnp.arange(common.padded(head_dim))
        inside = columns < head_dim
        part_lse = pltriton.load(refs["parts_lse"].at[program, split, head], mask=is_written, other=-jnp.inf)
        parts = common.load(
            refs["parts"].at[program, split[:, None], head, columns[None, :]], is_written[:, None] & inside[None, :]
        )
        highest = jnp.maximum(jnp.max(part_lse, keepdims=True), common.LOWEST)
        weights = jnp.exp2(part_lse - highest)
        acc = jnp.sum(parts * weights[:, None], axis=0, keepdims=True)
        total = jnp.sum(weights, keepdims=True)
        sinks = refs["sinks"][head][None].astype(jnp.float32) if "sinks" in refs else None
        out, lse = common.finished(highest, total, acc, sinks)
        refs["lse"][row, head] = jnp.where(slot < slots, jnp.sum(lse) * common.LN2, -jnp.inf)
        pltriton.store(refs["out"].at[row, head, columns], jnp.sum(out, axis=0).astype(refs["out"].dtype), mask=inside)
