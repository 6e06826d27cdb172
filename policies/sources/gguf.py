"""GGUF files: llama.cpp's single-file format of metadata and (mostly quantized) tensors.

The file's header is parsed here and not by `gguf.GGUFReader`, which makes several numpy views of every vocabulary
entry: 2.9 s for the 49,152 tokens of SmolLM2 on two cores, where this takes 0.1 s. Type numbers, block sizes and the
dequantization of K-quants are the `gguf` package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError
from dsjax.quantization import SCHEMES, QuantizedArray
from policies.base import Shape, WeightMap
from policies.gguf_models import gguf_config, gguf_weights

_MAGIC = b"GGUF"
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = {
    GGMLQuantizationType.Q4_0: SCHEMES["q4_0"],
    GGMLQuantizationType.Q4_1: SCHEMES["q4_1"],
    GGMLQuantizationType.Q8_0: SCHEMES["q8_0"],
}
_DEQUANTIZED = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)


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


class _Header:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise CheckpointError("the file ends inside its header; it is truncated, fetch it again")
        self.at += count
        return piece

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(struct.calcsize(code) * count))

    def string(self) -> str:
        return self.take(self.numbers("Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item, count = struct.unpack("<IQ", self.take(12))
            if item == GGUFValueType.STRING:
                return [self.string() for _ in range(count)]
            return list(self.numbers(self._code(item), count))
        return self.numbers(self._code(kind))[0]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"the header has a value of unknown type {kind}; the file is damaged or too new")
        return _SCALARS[GGUFValueType(kind)]

    def tensor(self) -> tuple[str, TensorInfo]:
        """One tensor's line, its offset still counted from the start of the data."""
        name = self.string()
        shape = tuple(reversed(self.numbers("Q", self.numbers("I")[0])))
        number, offset = struct.unpack("<IQ", self.take(12))
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise CheckpointError(f"tensor '{name}' has the unknown type {number}") from error
        block, nbytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise CheckpointError(f"tensor '{name}' {list(shape)} can not be cut into blocks of {block}")
        return name, TensorInfo(shape, kind, offset, math.prod(shape) // block * nbytes)


class GgufFile:
    """A GGUF checkpoint; tensors are read one at a time.

    Args:
      path: the file.

    Raises:
      CheckpointError: the file is missing, truncated, damaged, or not GGUF.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                if file.read(4) != _MAGIC:
                    raise CheckpointError("this is not a GGUF file (its first bytes are not 'GGUF')")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Header(data), len(data))
        except OSError as error:
            raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _parse(self, header: _Header, size: int) -> None:
        header.take(4)
        version = header.numbers("I")[0]
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version} is not read; 2 and 3 (little-endian) are")
        tensors, pairs = header.numbers("Q", 2)
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = header.string()
            self.metadata[key] = header.value(header.numbers("I")[0])
        infos = [header.tensor() for _ in range(tensors)]

        parts = self.metadata.get("split.count", 0)
        if parts not in (0, 1):
            raise CheckpointError(
                f"this is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`"
            )
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"general.alignment={alignment!r} is not a positive integer")
        start = -(-header.at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in infos:
            if name in self.tensors:
                raise CheckpointError(f"tensor '{name}' is listed twice")
            placed = self.tensors[name] = dataclasses.replace(info, offset=start + info.offset)
            if placed.offset + placed.nbytes > size:
                raise CheckpointError(
                    f"tensor '{name}' should end at byte {placed.offset + placed.nbytes}, the file has {size}; it is "
                    "truncated, fetch it again"
                )

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration, from the metadata.

        Raises:
          ConfigError: the architecture or one of its settings is not supported.
        """
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

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One tensor in memory of its own.

        Returns:
          F32, F16 and BF16 as they are. Q4_0, Q4_1 and Q8_0 as a quantized leaf of numpy arrays with the file's
          integers and scales, except vectors, which are dequantized, as Q4_K, Q5_K and Q6_K are, to float32.
        """
        info = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset)
        if info.kind in _PLAIN:
            return data.view(_PLAIN[info.kind]).reshape(info.shape)
        data = data.reshape(*info.shape[:-1], -1)
        scheme = _BLOCKS.get(info.kind)
        if scheme is None or len(info.shape) < 2:
            return dequantize(data, info.kind)

        blocks = data.reshape(*info.shape[:-1], -1, GGML_QUANT_SIZES[info.kind][1])
        first = 4 if scheme.has_minimum else 2
        # Any: the leaf's components are numpy arrays until they are put on a device.
        floats: Any = blocks[..., :first].copy().view(np.float16)
        values: Any = blocks[..., first:].reshape(*info.shape[:-1], -1)
        return QuantizedArray(
            values=values.view(np.int8) if scheme.bits == 8 else values,
            scales=floats[..., 0].copy(),
            minimums=floats[..., 1].copy() if scheme.has_minimum else None,
            scheme=scheme,
            dtype=np.dtype(np.float32),
        )
