"""Tensors that lie as plain bytes in a file, read without mapping it.

Pages of a mapped file stay in the process's resident memory and would count a second time for the tree. So bytes are
read into memory of their own, which starts where JAX wants it to start: on a CPU it then becomes the leaf's buffer and
is not copied once more.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.errors import CheckpointError
from policies.ops import Shape

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# What quantized weights are made from besides.
DTYPES = FLOATS | {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

_ALIGNMENT = 64  # what XLA asks of a CPU buffer that it takes over
_OWN_PAGES = 2**20  # bytes of an array that is not left to malloc
_PIECE = 2**24  # bytes that one reader takes of a large tensor
_READERS = 4


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object")
    return value


def require_file(path: Path) -> None:
    """Refuse what is missing, and what could keep a reader waiting for ever (a pipe, a device).

    Raises:
      CheckpointError: the path is no file.
    """
    if not path.is_file():
        what = "this is not a file" if path.exists() else "the file is missing"
        raise CheckpointError(f"{path}: {what}; fetch the checkpoint again")


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array to be filled, which `jax.device_put` can take over on a CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _OWN_PAGES:
        # Pages of its own go back to the system with the array, whichever thread frees it.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def check_kind(kind: str, where: str) -> None:
    """Refuse a dtype that is not read.

    Raises:
      CheckpointError: names it, and those that are.
    """
    if kind not in FLOATS:
        raise CheckpointError(f"{where} is of dtype {kind}, which is not read; these are: {', '.join(FLOATS)}")


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Where one tensor lies, and what it is.

    Attributes:
      path: of the file.
      file_size: of the file in bytes when its header was read.
      kind: dtype as safetensors spells it.
      shape: slowest axis first.
      offset: of its first element in the file, in bytes.
      strides: from one element to the next along each axis, in elements; `None` when they follow from the shape.
    """

    path: Path
    file_size: int
    kind: str
    shape: Shape
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Its size, of a dtype that is read."""
        return math.prod(self.shape) * DTYPES[self.kind].itemsize

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor in memory of its own, in the dtype of the file.

        Args:
          out: an array or columns of a matrix to read into, of this shape and dtype; `None` makes one.

        Raises:
          CheckpointError: the file is missing, or was changed or damaged since its header was read.
        """
        if out is None:
            out = aligned_empty(self.shape, DTYPES[self.kind])
        with _opened(self.path, self.file_size) as descriptor:
            self._read_into(descriptor, out)
        return out

    def _read_into(self, descriptor: int, out: np.ndarray) -> None:
        if self.strides is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
            # Mapped while it is copied: what lies between the elements may be larger than the tensor.
            mapped = np.memmap(self.path, DTYPES[self.kind], "r", self.offset, (span,))
            strides = [stride * mapped.itemsize for stride in self.strides]
            np.copyto(out, np.lib.stride_tricks.as_strided(mapped, self.shape, strides, writeable=False))
        elif not out.flags.c_contiguous:  # columns of a larger matrix
            size = self.nbytes // len(out)
            for i, row in enumerate(out):
                _fill(descriptor, row.view(np.uint8), self.offset + i * size)
        else:
            _fill(descriptor, out.reshape(-1).view(np.uint8), self.offset)


def read_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """Bytes of a file in memory of their own.

    Raises:
      CheckpointError: the file is missing, or ends before.
    """
    out = aligned_empty((nbytes,), np.dtype(np.uint8))
    with _opened(path, offset + nbytes) as descriptor:
        _fill(descriptor, out, offset)
    return out


@contextlib.contextmanager
def _opened(path: Path, file_size: int) -> Iterator[int]:
    """A file's descriptor; errors of reading name the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size < file_size:
                raise EOFError
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from error
    except EOFError as error:
        raise CheckpointError(
            f"{path}: can not be read (it is shorter than its header says); the file is truncated or damaged, fetch it "
            "again"
        ) from error


def _fill(descriptor: int, memory: np.ndarray, offset: int) -> None:
    """Bytes of a file from `offset` on, several pieces side by side when there are many."""
    begins = range(0, len(memory), _PIECE)

    def fill(begin: int) -> None:
        view, at = memory.data[begin : begin + _PIECE], offset + begin
        while len(view):
            count = os.preadv(descriptor, [view], at)
            if count == 0:
                raise EOFError
            view, at = view[count:], at + count

    if len(begins) < 2:
        for begin in begins:
            fill(begin)
        return
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(fill, begins):
            pass
