"""Normalization, plain and differentiable; `pallas_kernels.add_norm` also adds to the residual stream."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import ModelConfig


def norm(x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig) -> Float[Array, "*batch D"]:
    """The model's kind of norm over the last axis, statistics in float32.

    Args:
      x: what to norm.
      module: `scale` and `bias`, each only where the norm has one; their shapes broadcast against `x`.
      config: the kind of norm, its epsilon and offset.
    """
    wide = x.astype(jnp.float32)
    if config.norm == "layer":
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    if "scale" in module:
        wide *= module["scale"].astype(jnp.float32) + config.norm_offset
    if "bias" in module:
        wide += module["bias"].astype(jnp.float32)
    return wide.astype(x.dtype)


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square norm (arXiv 1910.07467), statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
