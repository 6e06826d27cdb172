"""A quantized weight of a checkpoint as one tensor, put together from those that hold its codes and scales."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from dsjax.errors import CheckpointError
from dsjax.quantization import QuantizedArray, Scheme, scheme
from policies.ops import Shape, Turned

_SCALE_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "e4m3",
    "F8_E8M0": "e8m0",
    "U8": "e8m0",
}
FLOATS = ("F32", "F16", "BF16")


class Tensor(Protocol):
    """A tensor of a checkpoint that can be read."""

    @property
    def kind(self) -> str:
        """Its dtype as safetensors spells it."""
        ...

    @property
    def shape(self) -> Shape:
        """Its shape."""
        ...

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        ...

    def read(self) -> Any:
        """Its values in memory of their own."""
        ...


class Parts(Mapping[str, Tensor]):
    """The tensors that stand for one weight, by what their names end with.

    Args:
      name: of the weight.
      tensors: those that there are.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]):
        self.name, self._tensors = name, tensors

    def __getitem__(self, part: str) -> Tensor:
        if part not in self._tensors:
            raise self.error(f"the checkpoint lacks its '{part}'; fetch the checkpoint again")
        return self._tensors[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, part: object) -> bool:
        return part in self._tensors

    def error(self, message: str) -> CheckpointError:
        """The error to raise about this weight."""
        return CheckpointError(f"quantized weight '{self.name}': {message}")

    def require(self, part: str, kind: str | tuple[str, ...], shape: Shape | None = None) -> Tensor:
        """One tensor, checked.

        Args:
          part: what its name ends with.
          kind: its dtype as safetensors spells it, or several that it may have.
          shape: that it must have; `None` takes any.

        Raises:
          CheckpointError: it is missing, or of another dtype or shape.
        """
        tensor = self[part]
        kinds = (kind,) if isinstance(kind, str) else kind
        if tensor.kind not in kinds:
            raise self.error(f"its '{part}' is of dtype {tensor.kind}, not {' or '.join(kinds)}")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise self.error(f"its '{part}' has shape {list(tensor.shape)}, not {list(shape)}")
        return tensor

    def group(self, columns: int, count: int) -> int | None:
        """How many weights of a row share a scale, if there are `count` of them; `None` for the whole row."""
        if count < 1 or columns % count:
            raise self.error(f"rows of {columns} weights do not divide into {count} groups")
        return None if count == 1 else columns // count


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight that lies in several tensors; reads as a quantized leaf of numpy arrays.

    Attributes:
      parts: the tensors.
      weight_shape: of the weight, `[..., out, in]`.
      scheme: what it is stored as.
      arrays: makes the leaf's arrays, by their names, from the parts. What it is given it may keep.
      turned: other checkpoints have it as `[..., in, out]` under this name.
    """

    parts: Parts
    weight_shape: Shape
    scheme: Scheme
    arrays: Callable[[Parts], Mapping[str, Any]]
    turned: bool = False

    @property
    def shape(self) -> Shape:
        """That of the plain tensor of this name."""
        *lead, rows, columns = self.weight_shape
        return (*lead, columns, rows) if self.turned else (*lead, rows, columns)

    @property
    def kind(self) -> str:
        """The scheme's name, without the dtype of the scales."""
        return self.scheme.name.partition(",")[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the parts take in the file."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self) -> QuantizedArray | Turned:
        """The weight with the file's codes and scales, read as float32.

        Raises:
          CheckpointError: a part is missing or damaged.
        """
        try:
            arrays: Any = {"minimums": None, **self.arrays(self.parts)}
        except CheckpointError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self.parts.error(f"its tensors do not fit together ({error})") from error
        leaf = QuantizedArray(**arrays, scheme=self.scheme, dtype=np.dtype(np.float32))
        return Turned(leaf) if self.turned else leaf


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store a weight.

    Attributes:
      mark: what the name of a tensor ends with that every weight stored like this has.
      parts: what those of all its tensors may end with, `mark` among them.
      weight: the end of its own name, in their place.
      build: puts the weight together, from the parts and the `quantization_config` of config.json. No tensor but the
        smallest ones is read then.
    """

    mark: str
    parts: tuple[str, ...]
    weight: str
    build: Callable[[Parts, Mapping[str, Any]], QuantizedTensor]


@dataclasses.dataclass(frozen=True)
class Format:
    """What the checkpoints of a `quant_method` hold.

    Attributes:
      check: refuses a `quantization_config` that asks for what is not read.
      layouts: of weights.
      unused: ends of the names of tensors that inference here does without: static scales of activations, of a
        key-value cache.
      bias: whether a layer without a bias may be stored with one of zeros.
    """

    check: Callable[[Mapping[str, Any]], None]
    layouts: tuple[Layout, ...]
    unused: tuple[str, ...] = ()
    bias: bool = False


def with_scales(name: str, kind: str, **fields: Any) -> Scheme:
    """A scheme whose scales are stored as those of a checkpoint.

    Args:
      name: of a scheme to begin with.
      kind: dtype of the scales as safetensors spells it.
      **fields: of `Scheme`, to change.
    """
    return scheme(name, **fields, scale_dtype=_SCALE_DTYPES[kind])
