"""Reversible operations between checkpoint tensors and leaves: what an entry of a weight map does to its tensors."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError
from dsjax.quantization import QuantizedArray

Shape = tuple[int, ...]
Leaf = np.ndarray | QuantizedArray | Any


@dataclasses.dataclass(frozen=True)
class Turned:
    """A quantized tensor `[..., out, in]` that unquantized checkpoints store as `[..., in, out]`."""

    leaf: QuantizedArray


@runtime_checkable
class Op(Protocol):
    """A reversible operation between checkpoint tensors and leaves; quantized leaves pass through it whole."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """Shapes that the tensors must have for leaves of these shapes."""
        ...

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """Leaves of these shapes from tensors."""
        ...

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Tensors from leaves: the inverse of `to_leaves`."""
        ...


@dataclasses.dataclass(frozen=True)
class Copy:
    """The leaf is the tensor."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The same shapes."""
        return leaf_shapes

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """The same arrays."""
        return tensors

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The same arrays."""
        return leaves


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The leaf is the tensor in another shape, which `shape` gives for the leaf's.

    With `shape=lambda leaf: (1, *leaf)`, a leaf `[N]` is stored as `[1, N]`.
    """

    shape: Any

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The shape that is stored."""
        return [tuple(self.shape(shape)) for shape in leaf_shapes]

    def to_leaves(self, tensors: list[Any], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """The leaf's own shape."""
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, leaf_shapes, strict=True)]

    def to_tensors(self, leaves: list[Any], config: ModelConfig) -> list[Leaf]:
        """The shape that is stored."""
        return [leaf.reshape(self.shape(leaf.shape)) for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class InterleavedRotary:
    """Row order of query and key projections where the two halves of a rotary pair are neighbours (Meta, llama.cpp).

    dsjax, as Hugging Face, rotates row `j` of a head with row `j + head_dim / 2`. Here row `2j` turns with `2j + 1`.
    With `head_dim = 6`, leaf rows 0 1 2 3 4 5 are tensor rows 0 2 4 1 3 5. Rows stay whole, so blocks of quantized
    weights do too.
    """

    def _rows(self, count: int, config: ModelConfig) -> np.ndarray:
        return np.arange(count).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The same shapes."""
        return leaf_shapes

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """Rows in rotate-half order."""
        return [tensor[self._rows(tensor.shape[0], config)] for tensor in tensors]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Rows in interleaved order."""
        return [leaf[np.argsort(self._rows(leaf.shape[0], config))] for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The leaf is the tensors, one behind the other along a new first axis."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The shape of one, as often as the first axis is long."""
        (shape,) = leaf_shapes
        return [shape[1:]] * shape[0]

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """The stack."""
        if len({_kind(tensor) for tensor in tensors}) > 1:
            names = sorted({getattr(tensor, "scheme", tensor.dtype).name for tensor in tensors})
            raise CheckpointError(
                f"the experts of a layer are stored in several ways ({', '.join(names)}), and have to be in one; load "
                "the unquantized checkpoint"
            )
        return [jax.tree.map(lambda *parts: np.stack(parts), *tensors)]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """What is stacked."""
        (leaf,) = leaves
        return [leaf[i] for i in range(leaf.shape[0])]


def _kind(tensor: Leaf) -> Any:
    """What tensors must share to be stacked."""
    return (tensor.kind, *dict(tensor.parts())) if isinstance(tensor, QuantizedArray) else None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Several leaves are rows of one tensor; a subclass says which.

    Attributes:
      axis: the one that rows run along, from the end where negative: -2 of stacked experts' weights.
    """

    axis: int = 0

    def order(self, counts: list[int], config: ModelConfig) -> np.ndarray:
        """For each row of the tensor, its row in the leaves one below the other."""
        return np.arange(sum(counts))

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """One tensor that holds the rows of all."""
        shape = list(leaf_shapes[0])
        shape[self.axis] = sum(shape[self.axis] for shape in leaf_shapes)
        return [tuple(shape)]

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """Each leaf's rows."""
        (tensor,) = tensors
        counts = [shape[self.axis] for shape in leaf_shapes]
        places = np.split(np.argsort(self.order(counts, config)), np.cumsum(counts)[:-1])
        return [_take(tensor, rows, self.axis) for rows in places]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """All rows in the tensor's order."""
        counts = [leaf.shape[self.axis] for leaf in leaves]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=self.axis), *leaves)
        return [_take(joined, self.order(counts, config), self.axis)]


def _take(tensor: Leaf, rows: np.ndarray, axis: int) -> Leaf:
    """Rows of a tensor; a view where they follow one another."""
    follow = (np.diff(rows) == 1).all()
    index = slice(int(rows[0]), int(rows[-1]) + 1) if follow else rows
    return tensor[(slice(None),) * (axis % len(tensor.shape)) + (index,)]


@dataclasses.dataclass(frozen=True)
class Join(Rows):
    """One tensor holds the leaves one below the other: `q`, then `k`, then `v`."""


@dataclasses.dataclass(frozen=True)
class Grouped(Rows):
    """One tensor holds `q`, `k` and `v` by key head: its query heads, itself, its value head; then the next.

    With 4 query and 2 key heads: q0 q1 k0 v0 q2 q3 k1 v1. Falcon, GPT-NeoX and BLOOM (where groups have one query
    head), InternLM2, Megatron-LM since version 2.

    Attributes:
      groups: how many groups, where it is not one for each key head (CodeGen has 4).
    """

    groups: int | None = None

    def order(self, counts: list[int], config: ModelConfig) -> np.ndarray:
        """See `Rows.order`."""
        rows = np.arange(sum(counts))
        parts = np.split(rows, np.cumsum(counts)[:-1])
        groups = self.groups or config.num_kv_heads
        return np.concatenate([part.reshape(groups, -1) for part in parts], axis=1).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Alternating(Rows):
    """One tensor holds a row of each leaf in turn: gpt-oss's gate and up, Megatron-LM's q, k and v in version 1."""

    def order(self, counts: list[int], config: ModelConfig) -> np.ndarray:
        """See `Rows.order`."""
        return np.arange(sum(counts)).reshape(len(counts), -1).T.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The tensors are `[in, out]`, as GPT-2's are; `op` is what is done once they are `[out, in]`."""

    op: Op = Copy()

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The last two axes swapped; vectors stay."""
        shapes = self.op.tensor_shapes(leaf_shapes, config)
        return [(*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape for shape in shapes]

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """Leaves from the swapped tensors."""
        return self.op.to_leaves([_swapped(tensor) for tensor in tensors], config, leaf_shapes)

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The tensors, swapped."""
        return [_swapped(tensor) for tensor in self.op.to_tensors(leaves, config)]


def _swapped(tensor: Leaf | Turned) -> Leaf:
    if isinstance(tensor, Turned):
        return tensor.leaf
    if isinstance(tensor, QuantizedArray):
        raise CheckpointError("a quantized tensor that is stored [in, out] can not be turned; load it unquantized")
    return tensor.swapaxes(-1, -2) if tensor.ndim > 1 else tensor
