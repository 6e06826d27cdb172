"""Attention of the decoder: the projections, and what dense batches do with them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.layers.linear import linear
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import Phases, rotate
from pallas_kernels.dense_attention import dense_attention


def project_qkv(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, implementation: str | None
) -> Float[Array, "*parts_and_batch N2K H"]:
    """Heads of queries, then keys, then values, neither normed nor rotated; one product when the tree is fused.

    Of a few rows the kernel gives partial sums in float32, along a first axis more.
    """
    if "qkv" in module:
        heads = linear(x, module["qkv"], implementation, partial=True)
    else:
        heads = jnp.concatenate([linear(x, module[name], implementation) for name in "qkv"], axis=-1)
    return heads.reshape(*heads.shape[:-1], -1, config.head_dim)


def attend_dense(
    qkv: Float[Array, "B L N2K H"], module: dict[str, Any], config: ModelConfig, angle: Phases, window: int | None
) -> Float[Array, "B L N H"]:
    """Causal attention within each row; differentiable."""
    q, k, v = jnp.split(qkv, (config.num_heads, config.num_heads + config.num_kv_heads), axis=-2)
    if config.qk_norm:
        q = rms_norm(q, module["q_norm"]["scale"], config.norm_eps)
        k = rms_norm(k, module["k_norm"]["scale"], config.norm_eps)
    return dense_attention(rotate(q, angle), rotate(k, angle), v, window=window)
