"""The quantized leaf: packed integers, a scale a group, and the scheme as static metadata."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A storage format: `weight = scale * (integer - zero) + minimum`, one scale for `group_size` weights of a row.

    Attributes:
      name: as the format's own documentation spells it.
      bits: of one integer: 4 (two to a byte) or 8.
      group_size: consecutive weights of the last axis that share a scale.
      zero: constant subtracted from the integer.
      has_minimum: whether each group also stores a minimum.
    """

    name: str
    bits: int
    group_size: int
    zero: int = 0
    has_minimum: bool = False


# The block formats of GGUF (llama.cpp, ggml-quants): 32 weights a block, float16 scale, and for Q4_1 a float16 minimum.
SCHEMES = {
    "q4_0": Scheme("q4_0", bits=4, group_size=32, zero=8),
    "q4_1": Scheme("q4_1", bits=4, group_size=32, has_minimum=True),
    "q8_0": Scheme("q8_0", bits=8, group_size=32),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "minimums"],
    meta_fields=["scheme", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight in packed integers that reads as a floating array of `shape` and `dtype`.

    The last axis is the one that is grouped and packed. Four-bit groups are packed in halves, as GGUF does: byte `j` of
    a group holds weight `j` in its low nibble and weight `j + group_size / 2` in its high nibble, so that unpacking is
    two contiguous halves and no interleaving.

    Attributes:
      values: `uint8[..., in * bits / 8]`, or `int8[..., in]` at 8 bits.
      scales: `float16[..., in / group_size]`.
      minimums: the same shape, or `None` when the scheme has none.
      scheme: the format.
      dtype: what the weight dequantizes to.
    """

    values: jax.Array
    scales: jax.Array
    minimums: jax.Array | None
    scheme: Scheme
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return (*self.values.shape[:-1], self.values.shape[-1] * 8 // self.scheme.bits)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.values.size * 8 // self.scheme.bits

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def layout(self) -> tuple:
        """What two leaves must share to be joined."""
        return self.scheme, str(self.dtype), self.shape[:-2], self.shape[-1]

    def astype(self, dtype: Any) -> "QuantizedArray":
        """The same integers and scales, read as another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, rows: Any) -> "QuantizedArray":
        """Rows along the leading axes; the last axis must stay whole."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight as a plain array of `dtype` (default: its own), computed in float32."""
        group = self.scheme.group_size
        packed = self.values.reshape(*self.values.shape[:-1], -1, group * self.scheme.bits // 8)
        if self.scheme.bits == 4:
            packed = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
        weight = (packed.astype(jnp.float32) - self.scheme.zero) * self.scales.astype(jnp.float32)[..., None]
        if self.minimums is not None:
            weight += self.minimums.astype(jnp.float32)[..., None]
        return weight.reshape(self.shape).astype(dtype or self.dtype)

    @classmethod
    def concatenate(cls, pieces: "list[QuantizedArray]") -> "QuantizedArray":
        """Join leaves of one layout along the axis before the last, `out`."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-2), *pieces)

    def __repr__(self) -> str:
        return (
            f"QuantizedArray({self.scheme.name}, {list(self.shape)}, {jnp.dtype(self.dtype).name}, {self.nbytes:,} B)"
        )
