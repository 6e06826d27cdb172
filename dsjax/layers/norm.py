"""Normalization."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square norm (arXiv 1910.07467), statistics in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
