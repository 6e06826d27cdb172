"""Dense attention in plain XLA operations, a block of queries at a time.

Memory grows with keys times the queries of a block, forwards and, as each block is computed again there (arXiv
2112.05682), backwards. What fits into one block is plain attention with no loop.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_gpu

# Float32 scores of a block, over the whole batch: what the cache holds.
CPU_BYTES = 2**22
GPU_BYTES = 2**26
MIN_BLOCK = 128  # queries; fewer would starve the matrix units
MASKED = -1e30  # finite, so that a row with nothing visible stays free of NaN


def attention(q, k, v, lengths, *, causal, window, scale, soft_cap, alibi_slopes, sinks):
    """See `api.dense_attention`."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    per_head = (kv_heads, heads // kv_heads, 1, 1)

    def block_of(q, first_query, k, v, first_key):
        """Attention of the queries from `first_query` over the keys from `first_key`, `[B, b, K, G, H]`."""
        scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        key = first_key + jnp.arange(k.shape[1])
        distance = key - (first_query + jnp.arange(q.shape[1]))[:, None]
        if alibi_slopes is not None:
            scores += alibi_slopes.astype(jnp.float32).reshape(per_head) * distance
        visible = jnp.ones(distance.shape, bool)
        if causal:
            visible &= distance <= 0
        if window is not None:
            visible &= jnp.abs(distance) < window
        if lengths is not None:
            visible = visible & (key < lengths[:, None, None, None, None])

        scores = jnp.where(visible, scores, MASKED)
        highest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        sink = None if sinks is None else sinks.astype(jnp.float32).reshape(per_head)
        if sink is not None:
            highest = jnp.maximum(highest, lax.stop_gradient(sink))
        weights = jnp.where(visible, jnp.exp(scores - highest), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sink is not None:
            total += jnp.exp(sink - highest)
        weights = (weights / jnp.maximum(total, 1e-30)).astype(v.dtype)
        out = jnp.einsum("bkgqs,bskh->bqkgh", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    budget = CPU_BYTES if current_gpu() is None else GPU_BYTES
    block = max(1, budget // max(1, 4 * batch * heads * keys * MIN_BLOCK)) * MIN_BLOCK
    if block >= queries:
        out = block_of(q, 0, k, v, 0)
        return out.reshape(batch, queries, heads, head_dim)

    count = -(-queries // block)
    blocks = jnp.pad(q, ((0, 0), (0, count * block - queries), (0, 0), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(batch, count, block, *q.shape[2:]), 1, 0)
    before = 0 if window is None else window - 1  # keys that the first query of a block sees before its own
    span = block + before * (1 if causal else 2)

    @jax.checkpoint
    def one(rows, first_query):
        if window is None or span >= keys:
            return block_of(rows, first_query, k, v, 0)
        first_key = jnp.clip(first_query - before, 0, keys - span)
        seen = (lax.dynamic_slice_in_dim(x, first_key, span, axis=1) for x in (k, v))
        return block_of(rows, first_query, *seen, first_key=first_key)

    out = lax.map(lambda each: one(*each), (blocks, jnp.arange(count) * block))
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * block, heads, head_dim)[:, :queries]
