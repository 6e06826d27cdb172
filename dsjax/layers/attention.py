"""Attention: the projections, and what dense and ragged batches do with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dsjax.config import Layer, ModelConfig
from dsjax.layers.linear import linear
from dsjax.layers.norm import norm
from dsjax.layers.rope import Phases, rotate
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.pages import LayerPages
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.ragged_paged_attention import cascade_attention, ragged_paged_attention
from pallas_kernels.rotary_page_write import rotary_page_write


@dataclasses.dataclass(frozen=True)
class Ragged:
    """What all layers of a ragged pass share; `max_q_len` and the backends are static."""

    batch: RaggedBatch
    page: jax.Array  # int32[T], page that each token is written to; P for padding
    offset: jax.Array  # int32[T], its place there
    max_q_len: int | None
    kernels: str | None  # backend of all kernels but attention
    attention: str | None  # backend of attention


def project_qkv(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, implementation: str | None
) -> Float[Array, "*parts_and_batch N2K H"]:
    """Heads of queries, then keys, then values, neither normed nor rotated; one product when the tree is fused.

    Of a few rows the kernel gives partial sums in float32, along a first axis more.
    """
    if "qkv" in module:
        heads = linear(x, module["qkv"], implementation, partial=config.clip_qkv is None)
    else:
        heads = jnp.concatenate([linear(x, module[name], implementation) for name in "qkv"], axis=-1)
    if config.clip_qkv is not None:
        heads = jnp.clip(heads, -config.clip_qkv, config.clip_qkv)
    return heads.reshape(*heads.shape[:-1], -1, config.head_dim)


def _split(qkv: jax.Array, config: ModelConfig) -> list[jax.Array]:
    return jnp.split(qkv, (config.num_heads, config.num_heads + config.num_kv_heads), axis=-2)


def _normed(heads: Float[Array, "*batch N H"], module: dict[str, Any], config: ModelConfig):
    if config.qk_norm != "whole":
        return norm(heads, module, config)
    flat = heads.reshape(*heads.shape[:-2], -1)
    return norm(flat, module, config).reshape(heads.shape)


def _options(module: dict[str, Any], config: ModelConfig, layer: Layer) -> dict[str, Any]:
    """What dense and paged attention take alike."""
    slopes = jnp.asarray(config.alibi_slopes, jnp.float32) if config.alibi_slopes else None
    return {
        "scale": layer.scale,
        "window": layer.window,
        "soft_cap": config.attention_soft_cap,
        "alibi_slopes": slopes,
        "sinks": module["sinks"].astype(jnp.float32) if config.sinks else None,
    }


def attend_dense(
    x: Float[Array, "B L D"],
    module: dict[str, Any],
    config: ModelConfig,
    layer: Layer,
    angle: Phases | None,
    lengths: Int32[Array, "B"] | None,
) -> Float[Array, "B L N H"]:
    """Attention within each row; differentiable."""
    q, k, v = _split(project_qkv(x, module, config, "xla"), config)
    if config.qk_norm:
        q, k = _normed(q, module["q_norm"], config), _normed(k, module["k_norm"], config)
    if angle is not None:
        q, k = (rotate(heads, angle, config.rotary_interleaved) for heads in (q, k))
    return dense_attention(q, k, v, lengths=lengths, causal=config.causal, **_options(module, config, layer))


def attend_ragged(
    x: Float[Array, "T D"],
    module: dict[str, Any],
    config: ModelConfig,
    layer: Layer,
    angle: Phases | None,
    pages: LayerPages,
    ragged: Ragged,
) -> tuple[Float[Array, "T N H"], LayerPages]:
    """Attention over a layer's pages of keys and values, after this batch's have been written to them.

    Returns:
      The heads' outputs, and the pages.
    """
    qkv = project_qkv(x, module, config, ragged.kernels)
    cos, sin = (None, None) if angle is None else angle
    norms = {}
    if config.qk_norm == "head" and config.norm == "rms":
        norms = {name: module[name]["scale"] for name in ("q_norm", "k_norm")}
    elif config.qk_norm:
        q, k, v = _split(qkv.sum(axis=0).astype(x.dtype) if qkv.ndim == 4 else qkv, config)
        qkv = jnp.concatenate([_normed(q, module["q_norm"], config), _normed(k, module["k_norm"], config), v], axis=-2)
    assert pages.values is not None
    written = rotary_page_write(
        qkv,
        pages.keys,
        pages.values,
        ragged.page,
        ragged.offset,
        cos=cos,
        sin=sin,
        interleaved=config.rotary_interleaved,
        q_dtype=x.dtype,
        **norms,
        norm_eps=config.norm_eps,
        norm_offset=config.norm_offset,
        key_scales=pages.key_scales,
        value_scales=pages.value_scales,
        implementation=ragged.kernels,
    )
    pages = LayerPages(written.key_pages, written.value_pages, written.key_scales, written.value_scales)
    return attend_pages(written.q, pages, _options(module, config, layer), ragged).astype(x.dtype), pages


def attend_pages(
    q: Float[Array, "T N H"], pages: LayerPages, options: dict[str, Any], ragged: Ragged
) -> Float[Array, "T N H"]:
    """Paged attention of this batch, with a prefix that sequences share read once where that pays."""
    batch = ragged.batch
    if pages.key_scales is None:
        q = q.astype(pages.keys.dtype)
    arrays = q, pages.keys, pages.values, batch.page_table, batch.cu_q_lens, batch.kv_lens
    options = options | {"max_q_len": ragged.max_q_len, "implementation": ragged.attention}
    options |= {"key_scales": pages.key_scales, "value_scales": pages.value_scales}
    if batch.shared is not None and options["window"] is None:
        return cascade_attention(*arrays, batch.shared, **options)
    return ragged_paged_attention(*arrays, **options)
