"""Rotary position embedding (arXiv 2104.09864), rotate-half form, with scaled frequencies."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig

# Cosine and sine; broadcast against the batch.
Phases = tuple[Float[Array, "*#batch half"], Float[Array, "*#batch half"]]


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a token of each rotated pair: `float32[head_dim / 2]`, scaling applied."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** pairs).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind == "factors":
        return (frequencies / np.asarray(scaling.factors, np.float32)).astype(np.float32)
    # Llama 3.1: a wavelength fits `turns` times into the original context. Few turns: divide; many: keep; else blend.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def phases(positions: Int[Array, "*batch"], config: ModelConfig) -> Phases:
    """Cosine and sine of each pair's angle at each position, float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*batch heads H"], angle: Phases) -> Float[Array, "*batch heads H"]:
    """Rotate the pairs `(i, i + H/2)` of every head, in float32."""
    cos, sin = (part[..., None, :] for part in angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
