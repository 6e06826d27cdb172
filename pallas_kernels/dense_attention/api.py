"""Signature, checks and choice of backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import cudnn, reference, xla

OP = "dense_attention"
BACKENDS = {"cudnn": cudnn.attention, "xla": xla.attention, "reference": reference.attention}


def dense_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B Lk K H"],
    v: Float[Array, "B Lk K H"],
    *,
    lengths: Int32[Array, "B"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L N H"]:
    """Attention within each row of a padded batch; differentiable in queries, keys, values, slopes and sinks.

    Query head `n` uses key head `n // (N // K)`. Softmax and sums are float32.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys, in the dtype of `q`.
      v: values, in the dtype of `q`.
      lengths: how many keys of each row are real; in self-attention (`L == Lk`) also how many queries. Padding gives
        zeros, takes no gradient, and may hold anything, NaN included. `None` if all are real.
      causal: whether a query sees only keys up to its own position; else all of its row.
      window: a query sees itself and the `window - 1` keys before it (after it too if not `causal`); `None` for all.
      scale: of the products, default `1 / sqrt(H)`.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, as in Gemma 2; before `alibi_slopes`.
      alibi_slopes: for each query head, what a score gains a position from query to key (arXiv 2108.12409).
      sinks: for each query head, one more score of the softmax that has no value, as in gpt-oss.
      implementation: `"cudnn"` (GPUs from 8.0, bfloat16 and float16, none of the last three options), `"xla"` or
        `"reference"`; `None` for the best that can run.

    Returns:
      Attention output in the dtype of `q`.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or the backend can not run; the message says why.
    """
    _check(q, k, v, lengths, causal, window, soft_cap, alibi_slopes, sinks)
    options = {
        "causal": causal,
        # A window as long as the row hides nothing.
        "window": None if window is None or window >= k.shape[1] else window,
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
        "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    gpu = dispatch.current_gpu()
    refusals = {"cudnn": cudnn.refusals(q, k, lengths, **options, gpu=gpu), "xla": [], "reference": []}
    attend = BACKENDS[dispatch.choose(OP, refusals, implementation, gpu)]

    with jax.named_scope(OP):
        if lengths is None:
            return attend(q, k, v, None, **options)
        # Once here and for all backends: zeros in, zeros out, and so neither NaN nor gradient in either direction.
        has_padded_queries = q.shape[1] == k.shape[1]
        k, v = _clear(k, lengths), _clear(v, lengths)
        if not has_padded_queries:
            return attend(q, k, v, lengths, **options)
        return _clear(attend(_clear(q, lengths), k, v, lengths, **options), lengths)


def _clear(x, lengths):
    is_real = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(is_real[:, :, None, None], x, 0)


def _check(q, k, v, lengths, causal, window, soft_cap, alibi_slopes, sinks):
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"keys {k.shape} and values {v.shape} must both be [{batch}, Lk, K, {head_dim}], to fit queries"
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}; "
            "they must all be float32, bfloat16 or float16"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{kv_heads} key heads do not divide {heads} query heads")
    if queries != keys and (causal or window is not None or alibi_slopes is not None):
        raise ValueError(
            f"{queries} queries and {keys} keys have no common positions, which causal, window and alibi_slopes need"
        )
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != jnp.int32):
        raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}; it must be int32[{batch}], one for each row")
    if window is not None and window < 1:
        raise ValueError(f"window={window} hides everything; it must be at least 1, or None for no window")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive, or None for no cap")
    for name, each in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if each is not None and each.shape != (heads,):
            raise ValueError(f"{name} {each.shape} must have one entry for each of the {heads} query heads")
