"""Ragged paged attention in plain XLA operations: what runs on a CPU, and wherever no better kernel can.

Flash attention (arXiv 2205.14135) in two dense passes. Slots with one query go through all slots at once, a block of
pages at a time; slots with more are cut into blocks of queries, one loop iteration each. Loops end at the longest live
context, and nothing as large as the pool is ever made.
"""

import jax.numpy as jnp
from jax import lax

KEYS_PER_STEP = 256  # keys gathered at once for each slot: large enough to hide the loop, small enough for the cache
QUERIES_PER_BLOCK = 128
MASKED = -1e30  # finite, so that a row with nothing visible yet stays free of NaN


def attention(q, key_pages, value_pages, page_table, cu_q_lens, kv_lens, *, scale, window, max_q_len):
    """See `api.ragged_paged_attention`."""
    tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = key_pages.shape
    slots, pages_per_slot = page_table.shape
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    grouped = (q * scale).reshape(tokens, kv_heads, heads // kv_heads, head_dim)

    # A multiple of the pages in a step, so that no slice of the table is shifted back at its end.
    step = max(1, min(KEYS_PER_STEP // page_size, pages_per_slot, num_pages // (2 * slots)))
    table = jnp.pad(page_table, ((0, 0), (0, -pages_per_slot % step)))

    single = q_lens == 1
    first_row = jnp.minimum(cu_q_lens[:-1], tokens - 1)
    decoded = _decode(grouped[first_row], key_pages, value_pages, table, jnp.where(single, kv_lens, 0), window, step)
    slot = jnp.searchsorted(cu_q_lens[1:], jnp.arange(tokens), side="right", method="compare_all")
    out = jnp.where((slot < slots)[:, None, None, None], decoded.at[slot].get(mode="clip"), 0)
    if max_q_len > 1:
        many = jnp.where(single, 0, q_lens)
        chunks = _prefill(grouped, key_pages, value_pages, table, cu_q_lens, many, kv_lens, window, step)
        is_chunk = many.at[slot].get(mode="fill", fill_value=0) > 0
        out = jnp.where(is_chunk[:, None, None, None], chunks, out)
    return out.reshape(q.shape).astype(q.dtype)


def _gather(buffer, pages):
    """Pages `[..., step]` of every head, end to end: `[..., K, step * p, H]`.

    From a view of the pool in which a page of one head is a row, so that the result comes in order, with no transpose.
    """
    num_pages, kv_heads, page_size, head_dim = buffer.shape
    rows = pages[..., None, :] * kv_heads + jnp.arange(kv_heads)[:, None]
    picked = buffer.reshape(num_pages * kv_heads, page_size, head_dim).at[rows].get(mode="clip")
    return picked.reshape(*rows.shape[:-1], -1, head_dim)


def _softmax_step(carry, scores, visible, values, contract):
    """One step of the online softmax over a block of keys; statistics and sums in float32."""
    highest, total, acc = carry
    scores = jnp.where(visible, scores, MASKED)
    new = jnp.maximum(highest, scores.max(-1))
    weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0)
    correction = jnp.exp(highest - new)
    acc = acc * correction[..., None] + jnp.einsum(contract, weights.astype(values.dtype), values)
    return new, total * correction + weights.sum(-1), acc


def _start(shape):
    return jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)


def _decode(q, key_pages, value_pages, table, kv_lens, window, step):
    """One query a slot, `[S, K, G, H]`, at position `kv_lens - 1`; slots of length 0 give zero."""
    page_size = key_pages.shape[2]
    keys_per_step = step * page_size
    first_key = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    begin = jnp.min(jnp.where(kv_lens > 0, first_key, jnp.iinfo(jnp.int32).max)) // keys_per_step
    end = (jnp.max(kv_lens) + keys_per_step - 1) // keys_per_step

    def body(index, carry):
        pages = lax.dynamic_slice_in_dim(table, index * step, step, axis=1)
        position = index * keys_per_step + jnp.arange(keys_per_step)
        visible = (position < kv_lens[:, None]) & (position >= first_key[:, None])
        keys, values = (_gather(buffer, pages) for buffer in (key_pages, value_pages))
        values = jnp.where(visible[:, None, :, None], values, 0)
        scores = jnp.einsum("skgh,sknh->skgn", q, keys, preferred_element_type=jnp.float32)
        return _softmax_step(carry, scores, visible[:, None, None], values, "skgn,sknh->skgh")

    _, total, acc = lax.fori_loop(begin, end, body, _start(q.shape))
    return acc / jnp.maximum(total, 1e-30)[..., None]


def _prefill(q, key_pages, value_pages, table, cu_q_lens, q_lens, kv_lens, window, step):
    """The queries `[T, K, G, H]` of slots with `q_lens > 0`, block by block; other rows hold nothing of use."""
    tokens, page_size = q.shape[0], key_pages.shape[2]
    keys_per_step = step * page_size
    block = min(QUERIES_PER_BLOCK, tokens)
    blocks_before = jnp.cumsum((q_lens + block - 1) // block)
    padded = jnp.pad(q, ((0, block), (0, 0), (0, 0), (0, 0)))  # the last block may reach past the batch

    def one_block(index, out):
        slot = jnp.searchsorted(blocks_before, index, side="right")
        within = index - jnp.where(slot > 0, blocks_before[slot - 1], 0)
        row = cu_q_lens[slot] + within * block
        position = kv_lens[slot] - q_lens[slot] + within * block + jnp.arange(block)
        rows = lax.dynamic_slice_in_dim(padded, row, block).transpose(1, 0, 2, 3)  # [K, block, G, H]

        def body(key_index, carry):
            pages = lax.dynamic_slice(table, (slot, key_index * step), (1, step))[0]
            key_position = key_index * keys_per_step + jnp.arange(keys_per_step)
            visible = key_position <= position[:, None]
            if window is not None:
                visible &= key_position > position[:, None] - window
            keys, values = (_gather(buffer, pages) for buffer in (key_pages, value_pages))
            values = jnp.where((key_position < kv_lens[slot])[:, None], values, 0)
            scores = jnp.einsum("kqgh,knh->kqgn", rows, keys, preferred_element_type=jnp.float32)
            return _softmax_step(carry, scores, visible[:, None], values, "kqgn,knh->kqgh")

        begin = 0 if window is None else jnp.maximum(position[0] - window + 1, 0) // keys_per_step
        last = jnp.minimum(position[-1], kv_lens[slot] - 1)
        _, total, acc = lax.fori_loop(begin, last // keys_per_step + 1, body, _start(rows.shape))
        done = (acc / jnp.maximum(total, 1e-30)[..., None]).transpose(1, 0, 2, 3)
        # Blocks run in the order of their rows, so rows past a slot's end are overwritten by those that own them.
        return lax.dynamic_update_slice_in_dim(out, done, row, axis=0)

    out = jnp.zeros(padded.shape, jnp.float32)
    return lax.fori_loop(0, blocks_before[-1], one_block, out)[:tokens]
