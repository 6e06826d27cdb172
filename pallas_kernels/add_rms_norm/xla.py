"""Residual and norm in plain XLA operations: what runs on a CPU; differentiable."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.add_rms_norm.reference import pairwise_sum


def add_rms_norm(x, update, scale, *, eps):
    """See `api.add_rms_norm`; `update` is `[s, T, D]` or `None`."""
    if update is not None:
        # Part by part: a sum along the axis would be a kernel of its own on a GPU.
        total = pairwise_sum([part.astype(jnp.float32) for part in update])
        x = (x.astype(jnp.float32) + total).astype(x.dtype)
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return x, (wide * scale.astype(jnp.float32)).astype(x.dtype)
