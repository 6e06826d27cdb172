"""The embedding of images: squares of pixels, each a token."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.layers.linear import linear
from dsjax.layers.norm import norm


def embed_patches(
    pixels: Float[Array, "B C height width"], params: dict[str, Any], config: ModelConfig
) -> Float[Array, "B L D"]:
    """What enters the first layer: the class token, then the squares row by row.

    Args:
      pixels: images; computed in the dtype of the class token.
      params: the model's tree.
      config: the architecture; has `patches`.
    """
    patches = config.patches
    assert patches is not None
    first = params["patches"]["class_token"]
    side, size = patches.image_size // patches.size, patches.size
    whole = pixels[:, :, : side * size, : side * size].astype(first.dtype)
    squares = whole.reshape(*whole.shape[:2], side, size, side, size).transpose(0, 2, 4, 1, 3, 5)
    x = linear(squares.reshape(whole.shape[0], patches.count, -1), params["patches"])
    x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, first.shape[0])), x], axis=1)
    if config.learned_positions:
        x += params["positions"]["weight"][: x.shape[1]].astype(x.dtype)
    return norm(x, params["embed_norm"], config) if config.embed_norm else x
