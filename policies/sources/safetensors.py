"""Hugging Face folders: config.json beside one or many safetensors files.

A safetensors file is eight bytes of header length, a JSON header, and the tensors end to end
(https://github.com/huggingface/safetensors). Tensors are read with plain file reads, not mapped: pages of a mapped file
stay in the process's resident memory until the kernel wants them back, and would count a second time for the tree.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from policies import registry
from policies.base import Shape, WeightMap

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, safetensors dtype name, shape, and first byte in the file."""

    path: Path
    kind: str
    shape: Shape
    offset: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file by name.

    Raises:
      CheckpointError: the file is missing, truncated, or not safetensors.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > size:
                raise CheckpointError(f"{path}: ends inside its header; it is truncated or not a safetensors file")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        tensors, ends = {}, [start]
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            info = tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), start + begin)
            fits = info.kind not in _DTYPES or math.prod(info.shape) * _DTYPES[info.kind].itemsize == end - begin
            if not fits or begin < 0:
                raise CheckpointError(f"{path}: tensor '{name}' {list(info.shape)} does not take {end - begin} bytes")
            ends.append(start + end)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: has a damaged header ({error})") from error
    if max(ends) > size:
        raise CheckpointError(f"{path}: should have {max(ends)} bytes, has {size}; it is truncated, fetch it again")
    return tensors


class HfFolder:
    """A Hugging Face checkpoint folder; tensors are read one at a time.

    Args:
      path: the folder.

    Raises:
      CheckpointError: there is no config.json.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{self.path}: {_what_is_there(self.path)}")

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration: config.json, with the ids that end a generation from generation_config.json if it has any.

        Raises:
          ConfigError: the architecture or one of its fields is not supported.
          CheckpointError: a file can not be read.
        """
        raw = read_json(self.path / "config.json")
        if (self.path / "generation_config.json").is_file():
            generation = read_json(self.path / "generation_config.json")
            if generation.get("eos_token_id") is not None:
                raw["eos_token_id"] = generation["eos_token_id"]
            if raw.get("bos_token_id") is None:
                raw["bos_token_id"] = generation.get("bos_token_id")
        try:
            return registry.get(str(raw.get("model_type"))).read_config(raw)
        except ConfigError as error:
            raise ConfigError(f"{self.path / 'config.json'}: {error}") from error

    @property
    def weights(self) -> WeightMap:
        """The map from this family's tensor names to leaves."""
        return registry.get(self.config.model_type).weights

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name.

        Raises:
          CheckpointError: a file is missing, truncated or damaged, or lacks a tensor that the index promises.
        """
        if (self.path / _SINGLE).is_file():
            return read_header(self.path / _SINGLE)
        if not (self.path / _INDEX).is_file():
            raise CheckpointError(f"{self.path}: {_what_is_there(self.path)}")
        places = read_json(self.path / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise CheckpointError(f"{self.path / _INDEX}: has no 'weight_map' from tensors to files")
        shards = {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{self.path / _INDEX}: names a shard outside of the folder: {shard!r}")
            shards[shard] = read_header(self.path / shard)
        for tensor, shard in places.items():
            if tensor not in shards[shard]:
                raise CheckpointError(f"{self.path / _INDEX}: promises tensor '{tensor}' in '{shard}', which lacks it")
        return {tensor: shards[shard][tensor] for tensor, shard in places.items()}

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name.

        Raises:
          CheckpointError: a tensor has a dtype that is not read; it is named.
        """
        for name, info in self.tensors.items():
            if info.kind not in _DTYPES:
                raise CheckpointError(
                    f"{info.path}: tensor '{name}' is of dtype {info.kind}, which is not read; these are: "
                    + ", ".join(_DTYPES)
                )
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in memory of its own, in float32, float16 or bfloat16 as stored."""
        info, dtype = self.tensors[name], _DTYPES[self.tensors[name].kind]
        return np.fromfile(info.path, dtype, math.prod(info.shape), offset=info.offset).reshape(info.shape)


def _what_is_there(path: Path) -> str:
    """Why a folder is no checkpoint, and what to do with what it does hold."""
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "holds torch files (.bin), which are not read yet; convert them to safetensors (save_pretrained does)"
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"holds GGUF files; give the path of one of them, such as {path / ggufs[0]}"
    need = "config.json" if "config.json" not in names else f"{_SINGLE} or {_INDEX}"
    return f"there is no {need} in this folder, which holds: {', '.join(names[:10]) or 'nothing'}"
