"""Key/value pages: the memory of every sequence, in pieces of `page_size` tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsjax.config import ModelConfig
from dsjax.errors import RequestError
from dsjax.params import Params
from dsjax.ragged.groups import PageGroups
from pallas_kernels.rotary_page_write.api import PLAIN, QUANTIZED


class LayerPages(NamedTuple):
    """What one layer reads and writes."""

    keys: jax.Array
    values: jax.Array | None
    key_scales: jax.Array | None
    value_scales: jax.Array | None


def pages_dtype(asked: Any, params: Params) -> str:
    """Name of the dtype of the pages.

    Args:
      asked: float32, bfloat16 or float16; or, with a scale for each token and head, int8, float8_e5m2 or `"fp8"`, which
        is float8_e4m3fn; `None` for the dtype of the embedding.
      params: the model's.

    Raises:
      RequestError: it is none of these.
    """
    if asked is None:
        return jnp.dtype(params["embed"]["weight"].dtype).name
    names = [jnp.dtype(kind).name for kind in PLAIN + QUANTIZED]
    try:
        name = jnp.dtype(jnp.float8_e4m3fn if asked == "fp8" else asked).name
    except TypeError:
        name = ""
    if name not in names:
        raise RequestError(
            f"kv_dtype={asked!r} is not supported; pages can be {', '.join(names)}, or 'fp8', the first float8"
        )
    return name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """The pool: a pair of buffers for each layer of a group, so that each is updated in place on its own.

    One page of one head is contiguous, which is the tile that attention reads. With latent attention the keys are one
    compressed vector a token, `[P, 1, p, kv_rank + rope_size]`, and there are no values. Pages of one byte a number
    have a scale for each token and head.
    """

    keys: tuple[jax.Array, ...]  # as often as a group has layers, [P, K, p, H]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array, ...] = ()  # float32[P, K, p], of pages of one byte a number
    value_scales: tuple[jax.Array, ...] = ()
    groups: PageGroups = dataclasses.field(default=PageGroups(), metadata={"static": True})

    @classmethod
    def zeros(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: Any, groups: PageGroups | None = None
    ) -> "KVPages":
        """An empty pool; by default all layers are one group that gives nothing back."""
        groups = groups or PageGroups()
        latent = config.latent
        heads = (config.num_kv_heads, config.head_dim) if latent is None else (1, latent.kv_rank + latent.rope_size)
        shape = (num_pages, heads[0], page_size, heads[1])
        buffers = 1 + max((buffer for _, buffer in groups.places), default=config.num_layers - 1)

        def pool(shape: tuple[int, ...], dtype: Any, wanted: bool = True) -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(buffers)) if wanted else ()

        scaled = jnp.dtype(dtype) in QUANTIZED
        return cls(
            keys=pool(shape, dtype),
            values=pool(shape, dtype, latent is None),
            key_scales=pool(shape[:3], jnp.float32, scaled),
            value_scales=pool(shape[:3], jnp.float32, scaled and latent is None),
            groups=groups,
        )

    def buffers(self) -> list["LayerPages"]:
        """What a layer reads and writes, for each layer of a group."""

        def of(pool: tuple[jax.Array, ...], i: int) -> jax.Array | None:
            return pool[i] if pool else None

        return [
            LayerPages(keys, of(self.values, i), of(self.key_scales, i), of(self.value_scales, i))
            for i, keys in enumerate(self.keys)
        ]

    def with_buffers(self, buffers: list["LayerPages"]) -> "KVPages":
        """The pool that these make: the reverse of `buffers`."""
        pools = (pool if pool[0] is not None else () for pool in zip(*buffers, strict=True))
        return KVPages(*pools, groups=self.groups)

    @property
    def num_pages(self) -> int:
        """Pages in the pool (P)."""
        return self.keys[0].shape[0]

    @property
    def page_size(self) -> int:
        """Tokens a page (p)."""
        return self.keys[0].shape[2]

    def copy(self, sources: Int[Array, "C"], targets: Int[Array, "C"], count: Int[Array, ""]) -> "KVPages":
        """Copy page `sources[i]` over page `targets[i]` for `i < count`, in every buffer.

        A loop of `count` trips and not one gather: most steps copy nothing, and nothing is what they then cost.
        """

        def one(i, pages):
            def move(buffer):
                page = lax.dynamic_index_in_dim(buffer, sources[i], keepdims=False)
                return lax.dynamic_update_index_in_dim(buffer, page, targets[i], 0)

            return jax.tree.map(move, pages)

        return lax.fori_loop(0, count, one, self)
