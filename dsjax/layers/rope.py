"""Rotary position embedding (arXiv 2104.09864) with scaled frequencies."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig, RopeScaling

# Cosine and sine; broadcast against the batch.
Phases = tuple[Float[Array, "*#batch pairs"], Float[Array, "*#batch pairs"]]


def _frequencies(theta: Any, size: int) -> Any:
    pairs = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return 1.0 / theta**pairs


def inverse_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """Radians a token of each rotated pair, scaling applied, for sequences within the original context.

    Args:
      config: the architecture.
      local: those of layers with a window, where they differ.

    Returns:
      `float32[rotary_size / 2]`.
    """
    theta = config.local_rope_theta if local else config.rope_theta
    frequencies = _frequencies(np.float32(theta), config.rotary_size).astype(np.float32)
    scaling = None if local else config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind in ("factors", "longrope"):
        return (frequencies / np.asarray(scaling.factors, np.float32)).astype(np.float32)
    kept = _yarn_kept(scaling, config) if scaling.kind == "yarn" else _llama3_kept(scaling, frequencies)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def _llama3_kept(scaling: RopeScaling, frequencies: np.ndarray) -> np.ndarray:
    # A wavelength fits `turns` times into the original context. Few turns: divide; many: keep; else blend.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(kept, 0.0, 1.0)


def _yarn_kept(scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    size = config.rotary_size

    def pair(turns: float) -> float:
        """Which pair turns so often within the original context."""
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / max(high - low, 1e-3)
    return 1 - np.clip(ramp, 0.0, 1.0)


def _frequencies_by_length(config: ModelConfig, lengths: Int[Array, "*batch"]) -> Float[Array, "*batch pairs"]:
    """Frequencies of sequences of these lengths, where they depend on them."""
    scaling, size = config.rope_scaling, config.rotary_size
    assert scaling is not None
    lengths = lengths[..., None].astype(jnp.float32)
    if scaling.kind == "longrope":
        short = inverse_frequencies(config)
        long = _frequencies(np.float32(config.rope_theta), size) / np.asarray(scaling.long_factors, np.float32)
        return jnp.where(lengths > scaling.original_context, long.astype(np.float32), short)
    longer = jnp.maximum(lengths / scaling.original_context, 1.0)
    theta = config.rope_theta * (scaling.factor * longer - (scaling.factor - 1)) ** (size / (size - 2))
    return _frequencies(theta, size)


def phases(
    positions: Int[Array, "*batch"],
    config: ModelConfig,
    *,
    local: bool = False,
    lengths: Int[Array, "*batch"] | None = None,
) -> Phases:
    """Cosine and sine of each pair's angle at each position, float32.

    Args:
      positions: places in their sequences.
      config: the architecture.
      local: those of layers with a window, where they differ.
      lengths: of the sequences, where `config.scales_by_length`.

    Returns:
      Both, with the scaling's attention factor.
    """
    if config.scales_by_length and not local:
        if lengths is None:
            raise ValueError("rotary frequencies that depend on the length of a sequence need the lengths")
        frequencies = _frequencies_by_length(config, lengths)
    else:
        frequencies = inverse_frequencies(config, local)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = 1.0 if local or config.rope_scaling is None else config.rope_scaling.attention_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(
    x: Float[Array, "*batch heads H"], angle: Phases, interleaved: bool = False
) -> Float[Array, "*batch heads H"]:
    """Rotate pairs of every head's first dimensions, in float32.

    Args:
      x: heads.
      angle: cosine and sine of `pairs` angles; dimensions from `2 * pairs` on pass unchanged.
      interleaved: the pairs are `(2i, 2i + 1)`, not `(i, i + pairs)`.
    """
    cos, sin = (part[..., None, :] for part in angle)
    size = 2 * cos.shape[-1]
    wide, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(wide.shape)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else rotated.astype(x.dtype)
