"""Shapes of real models, for tests, benchmarks and tuning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rotary_page_write.api import QUANTIZED


class Shape(NamedTuple):
    """What the op sees of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    half: int  # pairs that are rotated, 0 for none
    interleaved: bool = False
    norm: bool = False


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64, 32),
    "qwen3-0.6b": Shape(16, 8, 128, 64, norm=True),
    "llama-3.2-1b": Shape(32, 8, 64, 32),
    "llama-3.1-8b": Shape(32, 8, 128, 64),
    "llama-3.3-70b": Shape(64, 8, 128, 64),
    "gemma-2-9b": Shape(16, 8, 256, 128),
    "falcon-7b": Shape(71, 1, 64, 32),
    "phi-2": Shape(32, 32, 80, 16),
    "phi-3-mini": Shape(32, 32, 96, 48),
    "gpt-j-6b": Shape(16, 16, 256, 32, interleaved=True),
    "bloom-7b": Shape(32, 32, 128, 0),
}


def arguments(
    shape: Shape,
    tokens: int,
    dtype: Any = jnp.bfloat16,
    page_dtype: Any = None,
    num_pages: int = 512,
    page_size: int = 64,
) -> tuple[list[jax.ShapeDtypeStruct], dict[str, Any]]:
    """Abstract arguments of `rotary_page_write`: the positional ones, and those by name."""
    heads, kv_heads, head_dim, half, interleaved, norm = shape
    page_dtype = jnp.dtype(dtype if page_dtype is None else page_dtype)
    pages = jax.ShapeDtypeStruct((num_pages, kv_heads, page_size, head_dim), page_dtype)
    scales = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32) if page_dtype in QUANTIZED else None
    place = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    angle = jax.ShapeDtypeStruct((tokens, half), jnp.float32) if half else None
    weight = jax.ShapeDtypeStruct((head_dim,), dtype) if norm else None
    qkv = jax.ShapeDtypeStruct((tokens, heads + 2 * kv_heads, head_dim), dtype)
    return [qkv, pages, pages, place, place], {
        "cos": angle,
        "sin": angle,
        "interleaved": interleaved,
        "q_norm": weight,
        "k_norm": weight,
        "key_scales": scales,
        "value_scales": scales,
    }
