"""GGUF files: llama.cpp's single-file format of metadata and (mostly quantized) tensors.

The `gguf` package reads the header and dequantizes K-quants; tensors are read with plain file reads, one at a time:
pages of a mapped file stay in the process's resident memory and would count a second time for the tree. Reading the
header takes time and memory that grow with the vocabulary (SmolLM2's 49,152 tokens: about a second, and for that second
80 MB), so the loader and the tokenizer share what was read. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, dequantize

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError
from dsjax.quantization import SCHEMES, QuantizedArray
from policies.base import Shape, WeightMap
from policies.gguf_models import gguf_config, gguf_weights
from policies.sources.blocks import KINDS, leaf_of_blocks
from policies.sources.files import read_bytes, require_file

_MAGIC = b"GGUF"
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = {kind: SCHEMES[name] for name, kind in KINDS.items()}
_DEQUANTIZED = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)
_PIECE = 2**15  # blocks read at a time


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
      shape: slowest axis first, as numpy has it.
      kind: its ggml type.
      offset: of its first byte in the file.
      nbytes: its size in the file.
    """

    shape: Shape
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a file says before its tensors' data; holds nothing of the mapped file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Reader(GGUFReader):
    """The package's reader, stopped where the file ends; by itself it would count a damaged length to the end."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if isinstance(self.data, np.memmap):
            # Views of a plain array take half the memory, and less than half the time.
            self.data = self.data.view(np.ndarray)
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise CheckpointError(
                f"the file should have at least {end} bytes, has {len(self.data)}; it is truncated or damaged, fetch "
                "it again"
            )
        return super()._get(offset, dtype, count, override_order)


def _check_extents(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that share bytes."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (before, first), (after, second) in itertools.pairwise(ordered):
        if first.offset + first.nbytes > second.offset:
            raise ValueError(f"tensors '{before}' and '{after}' overlap")


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, modified: int, size: int) -> _Header:
    """The header of the file that has this size and time of modification, read once a process."""
    try:
        with np.errstate(over="raise"):
            reader = _Reader(path)
        # The reader adds keys of its own for the counts at the head of the file.
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        metadata = {key: field.contents() for key, field in fields.items()}
        tensors = {
            tensor.name: TensorInfo(
                tuple(reversed(tensor.shape.tolist())), tensor.tensor_type, tensor.data_offset, tensor.n_bytes
            )
            for tensor in reader.tensors
        }
        _check_extents(tensors)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:  # it has none of its own
        raise CheckpointError(
            f"the header can not be read ({error}); the file is damaged, fetch it again, or too new for the installed "
            "gguf package"
        ) from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError("this is a big-endian file; only little-endian ones are read")
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(f"this is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`")
    return _Header(MappingProxyType(metadata), MappingProxyType(tensors))


class GgufFile:
    """A GGUF checkpoint; tensors are read one at a time.

    Args:
      path: the file.

    Attributes:
      metadata: the values of the key-value section.
      tensors: where each tensor lies, by name.

    Raises:
      CheckpointError: the file is missing, truncated, damaged, or not GGUF.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        require_file(self.path)
        try:
            with open(path, "rb") as file:
                if file.read(4) != _MAGIC:
                    raise CheckpointError("this is not a GGUF file (its first bytes are not 'GGUF')")
                state = os.fstat(file.fileno())
            header = _read_header(self.path, state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.metadata, self.tensors = header.metadata, header.tensors

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration, from the metadata.

        Raises:
          ConfigError: the architecture or one of its settings is not supported.
          CheckpointError: there are fewer tensors than layers.
        """
        layers = self.metadata.get(f"{self.metadata.get('general.architecture')}.block_count", 0)
        if isinstance(layers, int) and layers > len(self.tensors):
            raise CheckpointError(f"{self.path}: should have {layers} layers, has {len(self.tensors)} tensors")
        return gguf_config(self.metadata, self)

    @property
    def weights(self) -> WeightMap:
        """The map from this file's tensor names to leaves."""
        return gguf_weights(str(self.metadata.get("general.architecture")))

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name.

        Raises:
          CheckpointError: a tensor has a type that is not read; it is named.
        """
        readable = (*_PLAIN, *_BLOCKS, *_DEQUANTIZED)
        for name, info in self.tensors.items():
            if info.kind not in readable:
                raise CheckpointError(
                    f"{self.path}: tensor '{name}' is of type {info.kind.name}, which is not read; these are: "
                    + ", ".join(kind.name for kind in readable)
                )
        return {name: info.shape for name, info in self.tensors.items()}

    def stored(self, name: str) -> tuple[str, int]:
        """The ggml type of one tensor, and its size in bytes."""
        return self.tensors[name].kind.name, self.tensors[name].nbytes

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One tensor in memory of its own.

        Returns:
          F32, F16 and BF16 as they are. Q4_0, Q4_1 and Q8_0 as a quantized leaf of numpy arrays with the file's
          integers and scales, except vectors, which are dequantized, as Q4_K, Q5_K and Q6_K are, to float32.
        """
        info, scheme = self.tensors[name], _BLOCKS.get(self.tensors[name].kind)
        if scheme is None or len(info.shape) < 2:
            data = read_bytes(self.path, info.offset, info.nbytes)
            if info.kind in _PLAIN:
                return data.view(_PLAIN[info.kind]).reshape(info.shape)
            return dequantize(data.reshape(*info.shape[:-1], -1), info.kind)

        nbytes = GGML_QUANT_SIZES[info.kind][1]
        count = info.nbytes // nbytes
        # In pieces, so that the file's layout and the leaf's are never both in memory.
        pieces = (
            read_bytes(self.path, info.offset + begin * nbytes, min(_PIECE, count - begin) * nbytes)
            for begin in range(0, count, _PIECE)
        )
        return leaf_of_blocks(info.shape, scheme, pieces)
