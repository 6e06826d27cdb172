"""What the op means, written for reading; the norm and the order of a long sum are shared with the other backends."""

import jax.numpy as jnp
from jax import lax


def pairwise_sum(parts):
    """Sum of a list of arrays, halves first: rounding grows with the logarithm of their number."""
    half = len(parts) // 2
    return parts[0] if len(parts) == 1 else pairwise_sum(parts[:half]) + pairwise_sum(parts[half:])


def normalize(x, scale, bias, kind, eps, offset):
    """Norm of each row, float32 in and out; see `api.add_norm`."""
    if kind is None:
        return x
    if kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    if scale is not None:
        x = x * (scale.astype(jnp.float32) + offset)
    return x if bias is None else x + bias.astype(jnp.float32)


def add_norm(x, update, scale, bias, *, kind, eps, offset, multiplier, update_scale, update_bias, update_kind):
    """The oracle of every backend; see `api.add_norm`. `x` is `[T, D]`, `update` `[s, T, D]` or `None`."""
    if update is not None:
        total = jnp.sum(update.astype(jnp.float32), axis=0)
        total = multiplier * normalize(total, update_scale, update_bias, update_kind, eps, offset)
        x = (x.astype(jnp.float32) + total).astype(x.dtype)
    return x, normalize(x.astype(jnp.float32), scale, bias, kind, eps, offset).astype(x.dtype)
