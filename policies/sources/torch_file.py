"""Files that `torch.save` writes, without torch and without running the pickle inside.

Such a file is an uncompressed zip archive: `data.pkl` describes the tensors, and the entries below `data/` are the
storages that they are views of. Tensors are read from where their storage lies in the file, one at a time. Format:
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import math
import os
import struct
import types
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.errors import CheckpointError
from policies.sources.files import FileTensor, require_file
from policies.sources.torch_pickle import read_pickle

_STORAGES = {
    "Float": ("F32", 4),
    "Half": ("F16", 2),
    "BFloat16": ("BF16", 2),
    "Double": ("F64", 8),
    "Long": ("I64", 8),
    "Int": ("I32", 4),
    "Short": ("I16", 2),
    "Char": ("I8", 1),
    "Byte": ("U8", 1),
    "Bool": ("BOOL", 1),
}
_DTYPES = "bfloat16 bool float16 float32 float64 half int16 int32 int64 int8 long uint8".split()
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: magic, then at its end the lengths of name and extra field
_MOST_NODES = 2**18  # of a state that is flattened
_LONGEST_NAME = 1000


class _Storage(NamedTuple):
    kind: str
    itemsize: int
    offset: int
    elements: int


class TorchFile:
    """A checkpoint file of torch; tensors are read one at a time.

    Args:
      path: the file.

    Attributes:
      state: what was saved: dictionaries, lists and numbers, a `types.SimpleNamespace` where an `argparse.Namespace`
        was, and a `FileTensor` for every tensor.

    Raises:
      CheckpointError: the file is missing, damaged, of the format before torch 1.6, or its pickle asks for more than
        weights need.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        require_file(self.path)
        try:
            with open(path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise CheckpointError(f"{path}: can not be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        # The standard library's zip reader has no error of its own for every kind of damage.
        except (EOFError, LookupError, NotImplementedError, struct.error, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path}: can not be read ({error}); the file is truncated or damaged, fetch it again"
            ) from error

    def _read(self, file: Any) -> None:
        self.size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\3\4":
            raise CheckpointError(
                "this is not a file of torch 1.6 or later (those are zip archives), or it is damaged; fetch it again, "
                "or load it with torch and save it anew"
            )
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("this zip archive holds no data.pkl, so torch did not write it as a checkpoint")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in self._entries and self._bytes(file, "byteorder") != b"little":
            raise CheckpointError("this file was written on a big-endian machine; only little-endian ones are read")
        storages: dict[str, _Storage] = {}

        def storage(identity: Any) -> _Storage:
            name, (kind, itemsize), key, _, elements = identity
            if name != "storage" or type(key) is not str or type(elements) is not int or elements < 0:
                raise ValueError("a storage is described wrongly")
            offset, size = self._extent(file, f"data/{key}")
            if elements * itemsize > size:
                raise ValueError(f"storage {key!r} should have {elements * itemsize} bytes, has {size}")
            storages[key] = _Storage(kind, itemsize, offset, elements)
            return storages[key]

        self.state = read_pickle(self._bytes(file, "data.pkl"), self._stand_ins(), storage)

    def _extent(self, file: Any, name: str) -> tuple[int, int]:
        """Offset and size of an entry's data in the file."""
        entry = self._entries[self._folder + name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {name!r} is compressed")
        file.seek(entry.header_offset)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if magic != b"PK\3\4" or begin + entry.file_size > self.size:
            raise ValueError(f"entry {name!r} does not lie where the archive says")
        return begin, entry.file_size

    def _bytes(self, file: Any, name: str) -> bytes:
        offset, size = self._extent(file, name)
        file.seek(offset)
        return file.read(size)

    def _stand_ins(self) -> dict[str, Any]:
        def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> FileTensor:
            numbers = (offset, *shape, *strides)
            if type(storage) is not _Storage or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("a tensor is described wrongly")
            last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            # A stride of zero would let a few bytes stand for a tensor of any size.
            if math.prod(shape) > storage.elements or (math.prod(shape) and last >= storage.elements):
                raise ValueError(f"a tensor of shape {list(shape)} does not fit into its storage")
            begin = storage.offset + offset * storage.itemsize
            contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            # Along an axis of one element, and in an empty tensor, the stride means nothing.
            same = all(size == 1 or a == b for size, a, b in zip(shape, strides, contiguous, strict=True))
            plain = same or not math.prod(shape)
            return FileTensor(self.path, self.size, storage.kind, shape, begin, None if plain else strides)

        return {
            "collections.OrderedDict": lambda items=(): dict(items),
            "argparse.Namespace": types.SimpleNamespace,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch.Size": tuple,
            "torch.device": lambda *name: name,
            **{f"torch.{name}": name for name in _DTYPES},
            **{f"torch.{name}Storage": kind for name, kind in _STORAGES.items()},
        }

    def tensors(self) -> dict[str, FileTensor]:
        """Every tensor of the state by its keys, joined with dots.

        Raises:
          CheckpointError: two have the same name, or the state contains itself.
        """
        found: dict[str, FileTensor] = {}
        waiting: list[tuple[str, Any]] = [("", self.state)]
        seen = 0
        while waiting:
            name, value = waiting.pop()
            if isinstance(value, FileTensor):
                if name in found:
                    raise CheckpointError(f"{self.path}: two tensors are called '{name}'")
                found[name] = value
            elif isinstance(value, dict):
                seen += len(value)
                # A pickle can name one dictionary in many places, and in itself.
                if seen > _MOST_NODES or len(name) > _LONGEST_NAME:
                    raise CheckpointError(f"{self.path}: the state in its pickle has no end; fetch the file again")
                prefix = f"{name}." if name else ""
                waiting.extend((f"{prefix}{key}", item) for key, item in reversed(value.items()))
        return found
