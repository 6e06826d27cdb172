"""What ragged paged attention means, written for reading: one query at a time, over every key of its slot."""

import jax
import jax.numpy as jnp
from jax import lax


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
    """The oracle of every backend; see `api.ragged_paged_attention`. All in float32, one query after the other."""
    del max_q_len
    tokens, heads, _ = q.shape
    slots, kv_heads = page_table.shape[0], key_pages.shape[1]

    def by_key_head(x):  # [N, ...] -> [K, N / K, ...]
        return x.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, *x.shape[1:])

    def context(pages, scales, slot):  # [P, K, p, H] -> [K, M * p, H]
        held = pages.at[page_table[slot]].get(mode="clip").astype(jnp.float32)
        if scales is not None:
            held *= scales.at[page_table[slot]].get(mode="clip")[..., None]
        return held.swapaxes(0, 1).reshape(kv_heads, -1, held.shape[-1])

    def attend(row):
        slot = jnp.sum(row >= cu_q_lens[1:])
        is_real = slot < slots
        slot = jnp.minimum(slot, slots - 1)
        keys, values = context(key_pages, key_scales, slot), context(value_pages, value_scales, slot)

        position = kv_lens[slot] - cu_q_lens[slot + 1] + row  # a slot's last query stands at its last key
        key_position = jnp.arange(keys.shape[1])
        distance = key_position - position
        visible = (key_position < kv_lens[slot]) & is_real
        if causal:
            visible &= distance <= 0
        if window is not None:
            visible &= jnp.abs(distance) < window
        if kv_starts is not None:
            visible &= key_position >= kv_starts[slot]

        scores = scale * jnp.einsum("kgh,kch->kgc", by_key_head(q[row]), keys, precision=lax.Precision.HIGHEST)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            scores += by_key_head(alibi_slopes)[..., None] * distance
        scores = jnp.where(visible, scores, -jnp.inf)

        lse = jax.nn.logsumexp(scores, axis=-1)
        if sinks is not None:
            lse = jnp.where(is_real, jnp.logaddexp(lse, by_key_head(sinks)), lse)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
        values = jnp.where(visible[:, None], values, 0)  # what lies past a slot's length may be NaN
        out = jnp.einsum("kgc,kch->kgh", weights, values, precision=lax.Precision.HIGHEST)
        return out.reshape(heads, -1).astype(q.dtype), lse.reshape(heads)

    return lax.map(attend, jnp.arange(tokens))
