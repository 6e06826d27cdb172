"""What ragged paged attention means, written for reading: every token gathers every key of its slot."""

import jax
import jax.numpy as jnp


def attention(q, key_pages, value_pages, page_table, cu_q_lens, kv_lens, *, scale, window, max_q_len):
    """The oracle of every backend; see `api.ragged_paged_attention`. Memory grows as tokens times context."""
    del max_q_len
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = key_pages.shape
    slots, pages_per_slot = page_table.shape

    rows = jnp.arange(tokens)
    slot = jnp.sum(rows[:, None] >= cu_q_lens[None, 1:], axis=1)
    is_real = slot < slots
    slot = jnp.minimum(slot, slots - 1)
    position = kv_lens[slot] - cu_q_lens[slot + 1] + rows  # the last query of a slot stands at its last key

    def context(pages):  # [T, M, K, p, H] -> [T, K, M * p, H]
        gathered = jnp.take(pages, page_table[slot], axis=0, mode="clip").swapaxes(1, 2)
        return gathered.reshape(tokens, kv_heads, pages_per_slot * page_size, head_dim).astype(jnp.float32)

    key_position = jnp.arange(pages_per_slot * page_size)
    visible = (key_position <= position[:, None]) & is_real[:, None]
    if window is not None:
        visible &= key_position > position[:, None] - window

    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32)
    scores = jnp.einsum("tkgh,tknh->tkgn", grouped, context(key_pages)) * scale
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
    values = jnp.where(visible[:, None, :, None], context(value_pages), 0)
    out = jnp.einsum("tkgn,tknh->tkgh", weights, values).reshape(q.shape)
    return jnp.where(is_real[:, None, None], out, 0).astype(q.dtype)
