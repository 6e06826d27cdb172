"""The quantized leaf: packed codes, their scales, and the scheme as static metadata."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.quantization.schemes import Scheme, variant
from pallas_kernels.quantized_matmul import Format, dequantize, from_tiles, tile_width, to_tiles

# Arrays with an axis `out`, and those with the axis `in` alone.
_MATRICES = ("values", "scales", "minimums", "zeros", "tensor_scale")
_VECTORS = ("permutation", "input_scale")
PARTS = _MATRICES + _VECTORS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(PARTS),
    meta_fields=["scheme", "dtype", "layout", "shares_inputs"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight in packed codes that reads as a floating array of `shape` and `dtype`.

    The last axis, `in`, is the one that is contracted, grouped and packed (see
    `pallas_kernels.quantized_matmul.formats`). Its columns may be stored in another order, and the weight may be one of
    inputs that were divided by something before: what a leaf stores is the matrix for `inputs(x)`. The shapes below are
    those of rows; `tiled` gives the same bits in the order in which kernels read them.

    Attributes:
      values: packed codes, `[..., out, in * bits / 8]`, uint8 or the dtype of an element of 8 bits.
      scales: `[..., out / rows, in / group_size]`, rounded up, and 1 where all share one; dtype as the scheme says.
      minimums: the same shape, or `None` when the scheme has none.
      scheme: the format.
      dtype: what the weight dequantizes to.
      zeros: the same shape, uint8 or floating, or `None` when the scheme has none.
      tensor_scale: `float32[..., 1 or out, 1]`, or `None` when the scheme has none.
      permutation: `int32[..., in]`: column `j` of what is stored is column `permutation[j]` of the weight; or `None`.
      input_scale: `[..., in]`: what inputs are divided by, in the order of the weight's columns; or `None`.
      layout: `"rows"` or `"tiles"`.
      shares_inputs: the weights that other projections of the same input have want it changed in the same way, so that
        they may be joined with this one.
    """

    values: jax.Array
    scales: jax.Array
    minimums: jax.Array | None
    scheme: Scheme
    dtype: Any
    zeros: jax.Array | None = None
    tensor_scale: jax.Array | None = None
    permutation: jax.Array | None = None
    input_scale: jax.Array | None = None
    layout: str = "rows"
    shares_inputs: bool = False

    @property
    def format(self) -> Format:
        """How the arrays are to be read, for the kernels."""
        scheme = self.scheme
        return Format(scheme.element, scheme.group_size, scheme.rows, scheme.zero, self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        if self.values.ndim == 1:
            return (self.values.shape[0] * 8 // self.scheme.bits,)
        return self.format.shape(self.values)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim - (self.layout == "tiles")

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(part.nbytes for _, part in self.parts())

    @property
    def kind(self) -> tuple:
        """What two leaves must share to be joined."""
        dtypes = tuple((name, jnp.dtype(part.dtype).name) for name, part in self.parts())
        return self.scheme, self.layout, self.shares_inputs, str(self.dtype), self.shape[:-2], self.shape[-1], dtypes

    @property
    def changes_inputs(self) -> bool:
        """Whether inputs are changed before the product."""
        return self.permutation is not None or self.input_scale is not None

    @property
    def has_own_inputs(self) -> bool:
        """Whether they are changed in a way that other weights for them need not share."""
        return self.changes_inputs and not self.shares_inputs

    def parts(self) -> Iterator[tuple[str, Any]]:
        """The arrays that there are, by name."""
        yield from self.matrices()
        yield from self.vectors()

    def matrices(self) -> Iterator[tuple[str, Any]]:
        """Of these, those with an axis `out`."""
        yield from ((name, part) for name in _MATRICES if (part := getattr(self, name)) is not None)

    def vectors(self) -> Iterator[tuple[str, Any]]:
        """Of these, those with the axis `in` alone."""
        yield from ((name, part) for name in _VECTORS if (part := getattr(self, name)) is not None)

    def astype(self, dtype: Any) -> "QuantizedArray":
        """The same codes and scales, read as another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Rows along the leading axes; the last axis must stay whole. Rows along `out` come in the layout of rows."""
        lead = self.ndim - 2
        index = index if isinstance(index, tuple) else (index,)
        if len(index) <= lead:
            return jax.tree.map(lambda part: part[index], self)
        leaf = self.with_scales_of_rows()
        if self.layout == "tiles":
            if lead:
                return leaf[index[:lead]][index[lead:]]
            rows = jnp.arange(self.shape[0])[index]
            taken = {name: jnp.take(part, rows.reshape(-1), axis=self._out(name)) for name, part in leaf.matrices()}
            return dataclasses.replace(leaf, **taken).in_rows()[jnp.arange(rows.size).reshape(rows.shape)]
        taken = {name: part[index] for name, part in leaf.matrices()}
        vectors = {name: part[index[:lead]] for name, part in leaf.vectors()}
        return dataclasses.replace(leaf, **taken, **vectors)

    def _out(self, name: str) -> int:
        """The axis `out` of a part."""
        return -2 if self.layout == "rows" or name in ("values", "tensor_scale") else -1

    def with_scales_of_rows(self) -> "QuantizedArray":
        """The same weight with a scale, or a row of them, for each row of `out`."""
        parts, out, scheme = {}, self.shape[-2] if self.ndim > 1 else 1, self.scheme
        if self.tensor_scale is not None and self.tensor_scale.shape[-2] == 1 != out:
            parts["tensor_scale"] = self.tensor_scale.repeat(out, axis=-2)
        if scheme.rows != 1:
            for name, part in self.matrices():
                if name in ("scales", "minimums", "zeros"):
                    spread = part.repeat(scheme.rows or out, axis=self._out(name))
                    parts[name] = spread[..., :out, :] if self.layout == "rows" else spread[..., :out]
            scheme = variant(scheme, rows=1)
        return dataclasses.replace(self, scheme=scheme, **parts)

    def tiled(self, shards: int = 1) -> "QuantizedArray":
        """The same bits as kernels read them, if they fit; see `pallas_kernels.quantized_matmul.tiles`.

        Args:
          shards: parts into which the axis `in` will be cut.
        """
        if self.layout == "tiles" or tile_width(self.format, self.shape[-1], shards) is None:
            return self
        *parts, _ = to_tiles(*self._arrays("values", "scales", "zeros", "minimums"), format=self.format, shards=shards)
        return self._laid_out("tiles", parts)

    def in_rows(self) -> "QuantizedArray":
        """The same bits as checkpoints have them."""
        if self.layout == "rows":
            return self
        *parts, _ = from_tiles(*self._arrays("values", "scales", "zeros", "minimums"), format=self.format)
        return self._laid_out("rows", parts)

    def _arrays(self, *names: str) -> list[Any]:
        """Parts as JAX's arrays, where those of a loader are numpy's; `None` where there are none."""
        return [None if (part := getattr(self, name)) is None else jnp.asarray(part) for name in names]

    def _laid_out(self, layout: str, parts: list[Any]) -> "QuantizedArray":
        named = dict(zip(("values", "scales", "zeros", "minimums"), parts, strict=True))
        return dataclasses.replace(self, **named, layout=layout)

    def inputs(self, x: jax.Array) -> jax.Array:
        """What the stored matrix is multiplied with for `x [..., in]`: scaled, and in the order of its columns."""
        if self.input_scale is not None:
            x = (x.astype(jnp.float32) / self.input_scale.astype(jnp.float32)).astype(x.dtype)
        return x if self.permutation is None else jnp.take(x, self.permutation, axis=-1)

    def stored(self, dtype: Any = None) -> jax.Array:
        """The matrix for `inputs(x)` as a plain array of `dtype` (default: the leaf's own), computed in float32."""
        if self.ndim == 1:
            return jax.tree.map(lambda part: part[None], self).stored(dtype)[0]
        arrays = self._arrays("values", "scales", "zeros", "minimums", "tensor_scale")
        return dequantize(*arrays, format=self.format, dtype=dtype or self.dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight as a plain array of `dtype` (default: its own), computed in float32."""
        if not self.changes_inputs:
            return self.stored(dtype)
        weight = self.stored(jnp.float32)
        if self.permutation is not None:
            back = jnp.argsort(self.permutation, axis=-1)[..., None, :]
            weight = jnp.take_along_axis(weight, back, axis=-1)
        if self.input_scale is not None:
            weight = weight / self.input_scale.astype(jnp.float32)[..., None, :]
        return weight.astype(dtype or self.dtype)

    @classmethod
    def concatenate(cls, pieces: "list[QuantizedArray]") -> "QuantizedArray":
        """Join leaves of one kind, none of which has its own inputs, along the axis before the last, `out`."""
        rows = pieces[0].scheme.rows
        if pieces[0].tensor_scale is not None or rows is None or any(piece.shape[-2] % rows for piece in pieces[:-1]):
            pieces = [piece.with_scales_of_rows() for piece in pieces]
        joined = {
            name: jnp.concatenate([getattr(piece, name) for piece in pieces], axis=part_axis)
            for name, part_axis in ((name, pieces[0]._out(name)) for name, _ in pieces[0].matrices())
        }
        return dataclasses.replace(pieces[0], **joined)

    @property
    def units(self) -> tuple[int, ...]:
        """`shape` counted in what must lie on one device: rows and columns that share bytes or scales."""
        (*lead, out, columns), rows, unit = self.shape, self.scheme.rows, self.scheme.unit
        if self.layout == "tiles":
            unit = math.lcm(unit, columns // self.values.shape[-3])
        blocks = out if rows is None else out // rows if out % rows == 0 else 1
        return (*lead, blocks, columns // unit if columns % unit == 0 else 1)

    def shardings(self, sharding: NamedSharding) -> "QuantizedArray":
        """Where the parts lie.

        Args:
          sharding: of an array of shape `units`, so that no device gets a part of a group.

        Returns:
          The leaf with a sharding in the place of each array; what all of an axis share is on every device.
        """
        *lead, out, columns = (*sharding.spec, *[None] * (self.ndim - len(sharding.spec)))

        def of(name: str, part: Any) -> NamedSharding:
            if name in _VECTORS:
                axes = (columns,)
            elif self.layout == "rows" or name == "tensor_scale":
                axes = out, columns
            else:
                axes = columns, out, None
            pairs = zip(part.shape, (*lead, *axes), strict=False)  # tiles of values have an axis that scales lack
            return NamedSharding(sharding.mesh, PartitionSpec(*(None if size == 1 else axis for size, axis in pairs)))

        return dataclasses.replace(self, **{name: of(name, part) for name, part in self.parts()})

    def __repr__(self) -> str:
        extra = "".join(f", {name}" for name in (*(["tiles"] if self.layout == "tiles" else []), *dict(self.vectors())))
        return (
            f"QuantizedArray({self.scheme.name}, {list(self.shape)}, {jnp.dtype(self.dtype).name}, "
            f"{self.nbytes:,} B{extra})"
        )
