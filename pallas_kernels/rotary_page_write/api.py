"""Signature, checks and choice of backend."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import dispatch

BACKENDS = ("triton", "xla", "reference")
QUANTIZED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
PLAIN = (jnp.float32, jnp.bfloat16, jnp.float16)


class Written(NamedTuple):
    """What comes back: the queries, and the pages in the buffers of those that were donated."""

    q: Float[Array, "T N H"]
    key_pages: Shaped[Array, "P K p H"]
    value_pages: Shaped[Array, "P K p H"]
    key_scales: Float32[Array, "P K p"] | None
    value_scales: Float32[Array, "P K p"] | None


def rotary_page_write(
    qkv: Float[Array, "*parts T N2K H"],
    key_pages: Shaped[Array, "P K p H"],
    value_pages: Shaped[Array, "P K p H"],
    page: Int32[Array, "T"],
    offset: Int32[Array, "T"],
    *,
    cos: Float32[Array, "T R2"] | None = None,
    sin: Float32[Array, "T R2"] | None = None,
    interleaved: bool = False,
    q_norm: Float[Array, "H"] | None = None,
    k_norm: Float[Array, "H"] | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    key_scales: Float32[Array, "P K p"] | None = None,
    value_scales: Float32[Array, "P K p"] | None = None,
    q_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Written:
    """Normalize and rotate queries and keys, and write keys and values into their pages.

    What DeepSpeed's `linear_blocked_kv_rotary` and `linear_blocked_kv_copy` do, with rotary embedding from arXiv
    2104.09864. All arithmetic is in float32. Donated pages and scales are updated in place.

    Args:
      qkv: the fused projection, seen as `N` query heads, then `K` key heads, then `K` value heads; float32, bfloat16
        or float16. With one axis more in front, partial sums that are added up in float32, as split products give.
      key_pages: pool of key pages: float32, bfloat16 or float16; or int8, float8_e4m3fn or float8_e5m2 with scales.
      value_pages: pool of value pages, as `key_pages`.
      page: page of each token; a token whose page is outside `[0, P)` is padding and writes nothing.
      offset: place of each token within its page, in `[0, p)`. No two tokens may have the same place.
      cos: cosine of each pair's angle; `None` for no rotary. Where `2 * R2 < H`, the last dimensions pass unchanged.
      sin: its sine.
      interleaved: rotate the pairs `(2i, 2i + 1)` (GPT-J) and not `(i, i + R2)` (GPT-NeoX, Llama).
      q_norm: scale of an RMS norm of each query head before the rotation (Qwen3, Gemma3), or `None`.
      k_norm: the same of each key head.
      norm_eps: added to the mean square.
      norm_offset: added to both scales in float32 (Gemma3 stores them less one).
      key_scales: scales of quantized keys: a key is its codes times the scale of its page, head and offset. The scale
        is the largest absolute value over 127, or over the largest float8; codes are rounded half to even.
      value_scales: the same of values.
      q_dtype: of the queries that come back, float32, bfloat16 or float16; default that of `qkv`.
      implementation: `"triton"`, `"xla"` or `"reference"`; `None` for the best that the platform has.

    Returns:
      Queries, and the pages and scales.

    Raises:
      ValueError: shapes or dtypes do not fit each other, or the backend can not run; the message says why.
    """
    _check(qkv, key_pages, value_pages, page, offset, cos, sin, q_norm, k_norm, key_scales, value_scales)
    q_dtype = jnp.dtype(q_dtype or qkv.dtype)
    if q_dtype not in PLAIN:
        raise ValueError(f"q_dtype is {q_dtype}; it must be float32, bfloat16 or float16")
    backend = dispatch.select(__name__, BACKENDS, implementation, qkv, key_pages, cos, interleaved)
    with jax.named_scope("rotary_page_write"):
        written = backend.rotary_page_write(
            qkv,
            key_pages,
            value_pages,
            page,
            offset,
            cos=cos,
            sin=sin,
            interleaved=interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=norm_eps,
            norm_offset=norm_offset,
            key_scales=key_scales,
            value_scales=value_scales,
            q_dtype=q_dtype,
        )
    return Written(*written)


def _check(qkv, key_pages, value_pages, page, offset, cos, sin, q_norm, k_norm, key_scales, value_scales):
    if qkv.ndim not in (3, 4):
        raise ValueError(f"qkv {qkv.shape} must be [T, N + 2 * K, H], or partial sums of that along a first axis")
    if qkv.ndim == 4 and not qkv.shape[0]:
        raise ValueError(f"qkv {qkv.shape} has no partial sums to add up")
    (tokens, all_heads, head_dim), (num_pages, kv_heads, page_size, _) = qkv.shape[-3:], key_pages.shape
    if qkv.dtype not in PLAIN:
        raise ValueError(f"qkv is {qkv.dtype}; it must be float32, bfloat16 or float16")
    if key_pages.shape != value_pages.shape or key_pages.shape[-1] != head_dim or key_pages.dtype != value_pages.dtype:
        pages = f"key pages {key_pages.dtype}{key_pages.shape} and value pages {value_pages.dtype}{value_pages.shape}"
        raise ValueError(f"{pages} must be alike, and heads of {head_dim} as in qkv {qkv.shape}")
    if all_heads <= 2 * kv_heads:
        raise ValueError(
            f"qkv {qkv.shape} has no query heads beside {kv_heads} key and {kv_heads} value heads; "
            "give it as [T, N + 2 * K, H]"
        )
    for name, places in (("page", page), ("offset", offset)):
        if places.shape != (tokens,) or places.dtype != jnp.int32:
            raise ValueError(f"{name} is {places.dtype}{places.shape}; it must be int32[{tokens}], one for each token")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together: give both, or neither for no rotary")
    if cos is not None and (cos.shape != sin.shape or cos.shape[0] != tokens or not 0 < 2 * cos.shape[1] <= head_dim):
        raise ValueError(
            f"cos {cos.shape} and sin {sin.shape} must be [{tokens}, R2] with 2 * R2 at most the head size {head_dim}"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"{name} {weight.shape} must be [{head_dim}], one scale for each dimension of a head")
    is_quantized = key_pages.dtype in QUANTIZED
    if not is_quantized and key_pages.dtype not in PLAIN:
        raise ValueError(f"pages are {key_pages.dtype}; they can be {', '.join(map(_name, PLAIN + QUANTIZED))}")
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is not None) != is_quantized:
            remedy = "need" if is_quantized else "take no"
            raise ValueError(f"pages of {key_pages.dtype} {remedy} {name}")
        if scales is not None and (scales.shape != key_pages.shape[:3] or scales.dtype != jnp.float32):
            wanted = f"float32[{num_pages}, {kv_heads}, {page_size}]"
            raise ValueError(f"{name} is {scales.dtype}{scales.shape}; it must be {wanted}")


def _name(dtype):
    return jnp.dtype(dtype).name
