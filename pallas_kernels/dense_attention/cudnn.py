"""Dense attention by cuDNN, the fastest on every GPU that it covers; forwards and backwards."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import OLDEST


def refusals(q, k, lengths, *, causal, window, soft_cap, alibi_slopes, sinks, gpu, **options):
    """Why cuDNN can not run: what this package knows, else what JAX says when it is asked."""
    if gpu is None:
        return ["there is no NVIDIA GPU"]
    reasons = []
    if gpu.capability < OLDEST:
        reasons.append(f"{gpu.kind} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, it needs 8.0")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"queries are {q.dtype}, it takes bfloat16 and float16")
    largest = 256 if gpu.capability >= (9, 0) else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        reasons.append(f"the head size {q.shape[-1]} is not a multiple of 8 up to {largest}")
    if window is not None and not causal:
        reasons.append("it has windows for causal attention only")
    for name, feature in (("soft_cap", soft_cap), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if feature is not None:
            reasons.append(f"it has no {name}")
    if not reasons:

        def total(q, k, v, lengths):
            return attention(q, k, v, lengths, causal=causal, window=window, **options).sum()

        try:
            # With its gradients: JAX looks at those only when they are traced, and then it is too late to choose.
            jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), q, k, k, lengths)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reasons.append(str(error))
    return reasons


def attention(q, k, v, lengths, *, causal, window, scale, **_):
    """See `api.dense_attention`; what padding rows hold is undefined here."""
    queries, keys = q.shape[1], k.shape[1]
    if queries % 2 or keys % 2:  # JAX has no gradients of odd lengths
        if lengths is None and not causal:
            lengths = jnp.full(q.shape[:1], keys, jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=lengths if queries == keys else None,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :queries]
