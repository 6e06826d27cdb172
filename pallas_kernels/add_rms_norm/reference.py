"""What the op means, written for reading; the order of a long sum is shared with the other backends."""

import jax.numpy as jnp


def pairwise_sum(parts):
    """Sum of a list of arrays, halves first: rounding grows with the logarithm of their number."""
    half = len(parts) // 2
    return parts[0] if len(parts) == 1 else pairwise_sum(parts[:half]) + pairwise_sum(parts[half:])


def add_rms_norm(x, update, scale, *, eps):
    """The oracle of every backend; see `api.add_rms_norm`. `update` is `[s, T, D]` or `None`."""
    if update is not None:
        total = x.astype(jnp.float32) + jnp.sum(update.astype(jnp.float32), axis=0)
        x = total.astype(x.dtype)
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return x, (wide / jnp.sqrt(mean_square + eps) * scale.astype(jnp.float32)).astype(x.dtype)
