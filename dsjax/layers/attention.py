"""Attention of the decoder: projections and rotary, the same for dense and ragged batches."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.layers.linear import linear
from dsjax.layers.rope import Phases, rotate


def project_qkv(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, angle: Phases
) -> tuple[Float[Array, "*batch N H"], Float[Array, "*batch K H"], Float[Array, "*batch K H"]]:
    """Rotated queries and keys, and values; one product when the tree is fused."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if "qkv" in module:
        q, k, v = jnp.split(linear(x, module["qkv"]), (query, query + kv), axis=-1)
    else:
        q, k, v = (linear(x, module[name]) for name in "qkv")
    q, k, v = (part.reshape(*x.shape[:-1], -1, config.head_dim) for part in (q, k, v))
    return rotate(q, angle), rotate(k, angle), v


def dense_attention(
    q: Float[Array, "B L N H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"], window: int | None
) -> Float[Array, "B L N H"]:
    """Causal attention within each row, softmax in float32; differentiable."""
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
