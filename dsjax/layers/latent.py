"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

The cache holds one vector a token: compressed keys and values, then the one key that is rotated. Attending over it,
each head's up-projection of keys is moved to its query and that of values to its output, so that nothing in the cache
is ever expanded: all heads share one key, of which the first part is also the value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dsjax.config import Latent, Layer, ModelConfig
from dsjax.layers.attention import Ragged, attend_pages
from dsjax.layers.linear import dense_weight, linear
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import Phases, rotate
from dsjax.ragged.pages import LayerPages
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.rotary_page_write import quantize


def _project(x, module, config: ModelConfig, latent: Latent, angle: Phases):
    """Queries without and with rotation `[*batch, N, .]`, the normed latent `[*batch, r]`, the rotated key."""
    rows = x
    if latent.query_rank is not None:
        rows = rms_norm(linear(x, module["q_down"]), module["q_down_norm"]["scale"], latent.norm_eps)
    q = linear(rows, module["q"]).reshape(*x.shape[:-1], config.num_heads, config.head_dim)
    compressed, key = jnp.split(linear(x, module["kv_down"]), (latent.kv_rank,), axis=-1)
    compressed = rms_norm(compressed, module["kv_down_norm"]["scale"], latent.norm_eps)
    plain, turned = jnp.split(q, (latent.nope_size,), axis=-1)
    turned = rotate(turned, angle, config.rotary_interleaved)
    key = rotate(key[..., None, :], angle, config.rotary_interleaved)[..., 0, :]
    return plain, turned, compressed, key


def _up(module, name: str, config: ModelConfig, dtype: Any) -> jax.Array:
    """An up-projection as `[N, size, kv_rank]`."""
    weight = dense_weight(module[name]["weight"], dtype)
    return weight.reshape(config.num_heads, -1, weight.shape[-1])


def latent_dense(
    x: Float[Array, "B L D"],
    module: dict[str, Any],
    config: ModelConfig,
    layer: Layer,
    angle: Phases,
    lengths: Int32[Array, "B"] | None,
) -> Float[Array, "B L N V"]:
    """Attention within each row, keys and values expanded; differentiable."""
    latent = config.latent
    assert latent is not None
    plain, turned, compressed, key = _project(x, module, config, latent, angle)
    k_up, v_up = (_up(module, name, config, x.dtype) for name in ("k_up", "v_up"))
    keys = jnp.einsum("blr,nhr->blnh", compressed, k_up)
    values = jnp.einsum("blr,nvr->blnv", compressed, v_up)
    keys = jnp.concatenate([keys, jnp.broadcast_to(key[:, :, None], (*keys.shape[:3], latent.rope_size))], axis=-1)
    size = max(config.head_dim, latent.value_size)  # attention wants keys and values of one size
    q, keys, values = (_padded(heads, size) for heads in (jnp.concatenate([plain, turned], axis=-1), keys, values))
    out = dense_attention(
        q, keys, values, lengths=lengths, causal=config.causal, window=layer.window, scale=layer.scale
    )
    return out[..., : latent.value_size]


def latent_ragged(
    x: Float[Array, "T D"],
    module: dict[str, Any],
    config: ModelConfig,
    layer: Layer,
    angle: Phases,
    pages: LayerPages,
    ragged: Ragged,
) -> tuple[Float[Array, "T N V"], LayerPages]:
    """Attention over a layer's pages of latent vectors `[P, 1, p, kv_rank + rope_size]`; gives them back too."""
    latent = config.latent
    assert latent is not None
    plain, turned, compressed, key = _project(x, module, config, latent, angle)
    entry, scales = jnp.concatenate([compressed, key], axis=-1), pages.key_scales
    place = ragged.page, 0, ragged.offset
    if scales is not None:
        entry, of_entry = quantize(entry.astype(jnp.float32), pages.keys.dtype)
        scales = scales.at[place].set(of_entry, mode="drop")
    cache = pages.keys.at[place].set(entry.astype(pages.keys.dtype), mode="drop")
    k_up, v_up = (_up(module, name, config, x.dtype) for name in ("k_up", "v_up"))
    q = jnp.concatenate([jnp.einsum("tnh,nhr->tnr", plain, k_up), turned], axis=-1)
    options = {"scale": layer.scale, "window": layer.window}
    out = attend_pages(q, LayerPages(cache, cache, scales, scales), options, ragged)[..., : latent.kv_rank]
    return jnp.einsum("tnr,nvr->tnv", out.astype(x.dtype), v_up), LayerPages(cache, None, scales, None)


def _padded(heads: jax.Array, size: int) -> jax.Array:
    return jnp.pad(heads, [(0, 0)] * (heads.ndim - 1) + [(0, size - heads.shape[-1])])
