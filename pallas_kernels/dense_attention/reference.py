"""What dense attention means, written for reading: every score at once, in float32."""

import jax
import jax.numpy as jnp


def attention(q, k, v, lengths, *, causal, window, scale, soft_cap, alibi_slopes, sinks):
    """The oracle of every backend; see `api.dense_attention`."""
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    k, v = (jnp.repeat(x.astype(jnp.float32), heads // kv_heads, axis=2) for x in (k, v))
    scores = jnp.einsum("bqnh,bknh->bnqk", q.astype(jnp.float32), k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)

    distance = jnp.arange(keys) - jnp.arange(queries)[:, None]  # from query to key
    if alibi_slopes is not None:
        scores += alibi_slopes.astype(jnp.float32)[:, None, None] * distance
    visible = jnp.ones((batch, 1, queries, keys), bool)
    if causal:
        visible &= distance <= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    if lengths is not None:
        visible &= jnp.arange(keys) < lengths[:, None, None, None]

    if sinks is not None:  # one more key that everyone sees and that has no value
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (batch, heads, queries, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
        visible = jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
    weights = jax.nn.softmax(scores, axis=-1, where=visible)[..., :keys]
    weights = jnp.where(jnp.any(visible, axis=-1, keepdims=True), weights, 0)
    return jnp.einsum("bnqk,bknh->bqnh", weights, v).astype(q.dtype)
