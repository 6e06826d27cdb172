"""Key/value pages: the memory of every sequence, in pieces of `page_size` tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsjax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """The pool: a pair of buffers a layer, so that each is updated in place on its own.

    One page of one head is contiguous, which is the tile that attention reads. With latent attention the keys are one
    compressed vector a token, `[P, 1, p, kv_rank + rope_size]`, and there are no values.
    """

    keys: tuple[jax.Array, ...]  # L times [P, K, p, H]
    values: tuple[jax.Array, ...]  # L times [P, K, p, H]

    @classmethod
    def zeros(cls, config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> "KVPages":
        """An empty pool."""
        latent = config.latent
        heads = (config.num_kv_heads, config.head_dim) if latent is None else (1, latent.kv_rank + latent.rope_size)
        shape = (num_pages, heads[0], page_size, heads[1])
        layers = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        return cls(layers, () if latent is not None else tuple(jnp.zeros(shape, dtype) for _ in layers))

    def layers(self) -> list[tuple[jax.Array, ...]]:
        """The buffers of each layer."""
        return list(zip(*(buffers for buffers in (self.keys, self.values) if buffers), strict=True))

    @classmethod
    def of_layers(cls, layers: list[tuple[jax.Array, ...]]) -> "KVPages":
        """The pool that these buffers make: the reverse of `layers`."""
        keys, *values = zip(*layers, strict=True)
        return cls(keys, values[0] if values else ())

    @property
    def num_pages(self) -> int:
        """Pages in the pool (P)."""
        return self.keys[0].shape[0]

    @property
    def page_size(self) -> int:
        """Tokens a page (p)."""
        return self.keys[0].shape[2]

    def copy(self, sources: Int[Array, "C"], targets: Int[Array, "C"], count: Int[Array, ""]) -> "KVPages":
        """Copy page `sources[i]` over page `targets[i]` for `i < count`, in every layer.

        A loop of `count` trips and not one gather: most steps copy nothing, and nothing is what they then cost.
        """

        def one(i, pages):
            def move(buffer):
                page = lax.dynamic_index_in_dim(buffer, sources[i], keepdims=False)
                return lax.dynamic_update_index_in_dim(buffer, page, targets[i], 0)

            return jax.tree.map(move, pages)

        return lax.fori_loop(0, count, one, self)
