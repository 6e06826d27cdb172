"""Named real shapes: the products of a layer of known models, as a decode step makes them."""

from typing import NamedTuple


class Product(NamedTuple):
    """One product of a layer: `[T, inner]` with a weight `[out, inner]`."""

    out: int
    inner: int
    activation: str | None = None
    partial: bool = True


def products(model_dim: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocabulary: int) -> dict[str, Product]:
    """Products of one layer and of the head.

    What feeds a norm or the rotary embedding comes in parts; the gate and up projections are one product.

    Args:
      model_dim: width of the residual stream.
      heads: query heads.
      kv_heads: key heads.
      head_dim: size of a head.
      ffn: width of the feed-forward layer.
      vocabulary: rows of the head.

    Returns:
      Products by name.
    """
    return {
        "qkv": Product((heads + 2 * kv_heads) * head_dim, model_dim),
        "out": Product(model_dim, heads * head_dim),
        "gate_up": Product(2 * ffn, model_dim, "silu", partial=False),
        "down": Product(model_dim, ffn),
        "head": Product(vocabulary, model_dim, partial=False),
    }


MODELS = {
    "smollm2-135m": products(576, 9, 3, 64, 1536, 49152),
    "qwen3-0.6b": products(1024, 16, 8, 128, 3072, 151936),
    "llama-3.2-1b": products(2048, 32, 8, 64, 8192, 128256),
    "llama-3.1-8b": products(4096, 32, 8, 128, 14336, 128256),
    "gpt-oss-20b": products(2880, 64, 8, 64, 2880, 201088),
    "llama-3.3-70b": products(8192, 64, 8, 128, 28672, 128256),
}
