"""Residual and norm in plain XLA operations: what runs on a CPU; differentiable."""

import jax.numpy as jnp

from pallas_kernels.add_norm.reference import normalize, pairwise_sum


def add_norm(x, update, scale, bias, *, kind, eps, offset, multiplier, update_scale, update_bias, update_kind):
    """See `api.add_norm`; `update` is `[s, T, D]` or `None`."""
    if update is not None:
        # Part by part: a sum along the axis would be a kernel of its own on a GPU.
        total = pairwise_sum([part.astype(jnp.float32) for part in update])
        total = multiplier * normalize(total, update_scale, update_bias, update_kind, eps, offset)
        x = (x.astype(jnp.float32) + total).astype(x.dtype)
    return x, normalize(x.astype(jnp.float32), scale, bias, kind, eps, offset).astype(x.dtype)
