"""Ragged paged attention in plain XLA operations: what runs on a CPU, and wherever no better kernel can.

Flash attention (arXiv 2205.14135) in two dense passes. Slots with one query go through all slots at once, a block of
pages at a time; slots with more are cut into blocks of queries, one loop iteration each. Loops end at the longest live
context, and nothing as large as the pool is ever made.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.quantized import LIFT

KEYS_PER_STEP = 256  # keys gathered at once for each slot: large enough to hide the loop, small enough for the cache
QUERIES_PER_BLOCK = 128
MASKED = -1e30  # finite, so that a row with nothing visible yet stays free of NaN


class _Context(NamedTuple):
    """Where the keys of each slot lie, and from which one on they are read."""

    pools: tuple  # keys, values [P, K, p, H]
    scales: tuple  # of each, [P, K, p] or None
    table: jax.Array  # int32[S, M], M a multiple of `step`
    kv_lens: jax.Array  # int32[S]
    kv_starts: jax.Array | None  # int32[S]
    step: int  # pages read at once for each slot

    @property
    def keys_per_step(self):
        return self.step * self.pools[0].shape[2]

    @property
    def lift(self):
        """How far below the highest score weights are relative to; see `quantized.LIFT`."""
        return math.log(2) * LIFT.get(self.pools[0].dtype, 0)

    def read(self, pages, dtype, axes_of_rows):
        """Keys and values of pages `[..., step]`: `[..., K, step * p, H]`, and scales to multiply scores with.

        Those are `[..., K, 1, step * p]` with as many axes of 1 as the rows of scores have, or `None`.
        """
        for pool, scales in zip(self.pools, self.scales, strict=True):
            if scales is not None:
                scales = _gather(scales[..., None], pages)[..., 0]
                scales = jnp.expand_dims(scales, range(-1 - axes_of_rows, -1))
            yield _gather(pool, pages).astype(dtype), scales


class _Scoring(NamedTuple):
    """How a product of query and key becomes a score; per-head parameters as `[K, N / K]`."""

    scale: float
    soft_cap: float | None
    slopes: jax.Array | None
    sinks: jax.Array | None

    def scores(self, products, key_scales, slopes, distance):
        scores = products * self.scale
        if key_scales is not None:
            scores *= key_scales
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        return scores if slopes is None else scores + slopes * distance


def attention(
    q,
    key_pages,
    value_pages,
    page_table,
    cu_q_lens,
    kv_lens,
    *,
    scale,
    window,
    soft_cap,
    causal,
    alibi_slopes,
    sinks,
    key_scales,
    value_scales,
    kv_starts,
    max_q_len,
):
    """See `api.ragged_paged_attention`; output and log-sum-exp."""
    tokens, heads, _ = q.shape
    num_pages, kv_heads, page_size, _ = key_pages.shape
    slots, pages_per_slot = page_table.shape
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]

    def by_key_head(x):
        return None if x is None else x.astype(jnp.float32).reshape(kv_heads, -1)

    scoring = _Scoring(scale, soft_cap, by_key_head(alibi_slopes), by_key_head(sinks))
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, -1)

    # A multiple of the pages in a step, so that no slice of the table is shifted back at its end.
    step = max(1, min(KEYS_PER_STEP // page_size, pages_per_slot, num_pages // (2 * slots)))
    table = jnp.pad(page_table, ((0, 0), (0, -pages_per_slot % step)))
    context = _Context((key_pages, value_pages), (key_scales, value_scales), table, kv_lens, kv_starts, step)

    single = q_lens == 1
    first_row = jnp.minimum(cu_q_lens[:-1], tokens - 1)
    decoded = _decode(grouped[first_row], context._replace(kv_lens=jnp.where(single, kv_lens, 0)), scoring, window)
    slot = jnp.searchsorted(cu_q_lens[1:], jnp.arange(tokens), side="right", method="compare_all")
    out, lse = (x.at[slot].get(mode="clip") for x in decoded)
    if max_q_len > 1:
        many = jnp.where(single, 0, q_lens)
        chunks = _prefill(grouped, cu_q_lens, many, context, scoring, window, causal)
        is_chunk = many.at[slot].get(mode="fill", fill_value=0)[:, None, None] > 0
        out, lse = jnp.where(is_chunk[..., None], chunks[0], out), jnp.where(is_chunk, chunks[1], lse)
    is_real = (slot < slots)[:, None, None]
    out, lse = jnp.where(is_real[..., None], out, 0), jnp.where(is_real, lse, -jnp.inf)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(tokens, heads)


def _gather(buffer, pages):
    """Pages `[..., step]` of every head, end to end: `[..., K, step * p, H]`.

    Page and head are one index, so that the result comes in order with no transpose, and that each device reads its own
    heads; of a view of the pool with flat rows every device would first gather the whole pool.
    """
    heads = jnp.arange(buffer.shape[1])[:, None]
    picked = buffer.at[pages[..., None, :], heads].get(mode="clip")
    return picked.reshape(*picked.shape[:-3], -1, buffer.shape[-1])


def _softmax_start(shape, sinks):
    """Before the first key: a sink is a score of weight 1 that has no value."""
    if sinks is None:
        return jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)
    return jnp.broadcast_to(jnp.maximum(sinks, MASKED), shape[:-1]), jnp.ones(shape[:-1]), jnp.zeros(shape)


def _softmax_step(carry, scores, visible, values, value_scales, lift, contract):
    """One step of the online softmax over a block of keys; statistics and sums in float32."""
    highest, total, acc = carry
    scores = jnp.where(visible, scores, MASKED)
    new = jnp.maximum(highest, scores.max(-1) - lift)
    weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0)
    correction = jnp.exp(highest - new)
    total = total * correction + weights.sum(-1)
    if value_scales is not None:
        weights = jnp.where(visible, weights * value_scales, 0)
    added = jnp.einsum(contract, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new, total, acc * correction[..., None] + added


def _softmax_end(highest, total, acc):
    """Output and log-sum-exp: 0 and minus infinity where nothing was seen."""
    return acc / jnp.maximum(total, 1e-30)[..., None], highest + jnp.log(total)


def _decode(q, context, scoring, window):
    """One query a slot, `[S, K, G, H]`, at position `kv_lens - 1`; slots of length 0 see nothing."""
    kv_lens, keys_per_step = context.kv_lens, context.keys_per_step
    first_key = jnp.zeros_like(kv_lens) if context.kv_starts is None else context.kv_starts
    if window is not None:
        first_key = jnp.maximum(kv_lens - window, first_key)
    begin = jnp.min(jnp.where(kv_lens > 0, first_key, jnp.iinfo(jnp.int32).max)) // keys_per_step
    end = (jnp.max(kv_lens) + keys_per_step - 1) // keys_per_step
    slopes = None if scoring.slopes is None else scoring.slopes[..., None]

    def body(index, carry):
        pages = lax.dynamic_slice_in_dim(context.table, index * context.step, context.step, axis=1)
        position = index * keys_per_step + jnp.arange(keys_per_step)
        visible = (position < kv_lens[:, None]) & (position >= first_key[:, None])
        (keys, key_scales), (values, value_scales) = context.read(pages, q.dtype, axes_of_rows=1)
        values = jnp.where(visible[:, None, :, None], values, 0)
        products = jnp.einsum("skgh,sknh->skgn", q, keys, preferred_element_type=jnp.float32)
        scores = scoring.scores(products, key_scales, slopes, (position - kv_lens[:, None] + 1)[:, None, None])
        visible = visible[:, None, None]
        return _softmax_step(carry, scores, visible, values, value_scales, context.lift, "skgn,sknh->skgh")

    return _softmax_end(*lax.fori_loop(begin, end, body, _softmax_start(q.shape, scoring.sinks)))


def _prefill(q, cu_q_lens, q_lens, context, scoring, window, causal):
    """The queries `[T, K, G, H]` of slots with `q_lens > 0`, block by block; other rows hold nothing of use."""
    tokens, keys_per_step = q.shape[0], context.keys_per_step
    block = min(QUERIES_PER_BLOCK, tokens)
    blocks_before = jnp.cumsum((q_lens + block - 1) // block)
    padded = jnp.pad(q, ((0, block), (0, 0), (0, 0), (0, 0)))  # the last block may reach past the batch
    sinks, slopes = scoring.sinks, scoring.slopes
    sinks = None if sinks is None else sinks[:, None]
    slopes = None if slopes is None else slopes[:, None, :, None]

    def one_block(index, done):
        slot = jnp.searchsorted(blocks_before, index, side="right")
        within = index - jnp.where(slot > 0, blocks_before[slot - 1], 0)
        row = cu_q_lens[slot] + within * block
        kv_len = context.kv_lens[slot]
        position = kv_len - q_lens[slot] + within * block + jnp.arange(block)
        rows = lax.dynamic_slice_in_dim(padded, row, block).transpose(1, 0, 2, 3)  # [K, block, G, H]

        # What any query of the block sees.
        first, end = 0 if context.kv_starts is None else context.kv_starts[slot], kv_len
        if window is not None:
            first = jnp.maximum(position[0] - window + 1, first)
        if causal or window is not None:
            end = jnp.minimum(position[-1] + (1 if causal else window), kv_len)

        def body(key_index, carry):
            pages = lax.dynamic_slice(context.table, (slot, key_index * context.step), (1, context.step))[0]
            key_position = key_index * keys_per_step + jnp.arange(keys_per_step)
            distance = key_position - position[:, None]
            held = (key_position >= first) & (key_position < kv_len)
            visible = distance <= 0 if causal else jnp.broadcast_to(held, distance.shape)
            if window is not None:
                visible &= abs(distance) < window
            if context.kv_starts is not None:
                visible &= key_position >= first
            (keys, key_scales), (values, value_scales) = context.read(pages, q.dtype, axes_of_rows=2)
            values = jnp.where(held[:, None], values, 0)
            products = jnp.einsum("kqgh,knh->kqgn", rows, keys, preferred_element_type=jnp.float32)
            scores = scoring.scores(products, key_scales, slopes, distance[:, None])
            return _softmax_step(carry, scores, visible[:, None], values, value_scales, context.lift, "kqgn,knh->kqgh")

        start = _softmax_start(rows.shape, sinks)
        attended = lax.fori_loop(first // keys_per_step, (end + keys_per_step - 1) // keys_per_step, body, start)
        # Blocks run in the order of their rows, so rows past a slot's end are overwritten by those that own them.
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part.swapaxes(0, 1), row, axis=0)
            for whole, part in zip(done, _softmax_end(*attended), strict=True)
        )

    nothing = jnp.zeros(padded.shape, jnp.float32), jnp.zeros(padded.shape[:-1], jnp.float32)
    out, lse = lax.fori_loop(0, blocks_before[-1], one_block, nothing)
    return out[:tokens], lse[:tokens]
