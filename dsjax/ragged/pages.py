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

    One page of one head is contiguous, which is the tile that attention reads.
    """

    keys: tuple[jax.Array, ...]  # L times [P, K, p, H]
    values: tuple[jax.Array, ...]  # L times [P, K, p, H]

    @classmethod
    def zeros(cls, config: ModelConfig, num_pages: int, page_size: int, dtype: Any) -> "KVPages":
        """An empty pool."""
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
        return cls(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)))

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
