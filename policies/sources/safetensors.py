"""Hugging Face folders: config.json beside one or many safetensors files.

The `safetensors` package maps a file to read it, and pages of a mapped file stay in the process's resident memory. So
each tensor is read with the file opened anew, and the tree is never in memory twice.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16, which safetensors asks it for by name
import numpy as np
from safetensors import SafetensorError, safe_open

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from policies import registry
from policies.base import Shape, WeightMap

_DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and what it is: file, safetensors dtype name, and shape."""

    path: Path
    kind: str
    shape: Shape


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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """One safetensors file, mapped as long as the context lasts; its errors name the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: can not be read ({error}); the file is truncated or damaged, fetch it again"
        ) from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file by name.

    Raises:
      CheckpointError: the file is missing, truncated, or not safetensors.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: TensorInfo(path, item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}


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
        """One tensor in memory of its own, in float32, float16 or bfloat16 as stored.

        Raises:
          CheckpointError: the file is missing or was damaged since its header was read.
        """
        with _opened(self.tensors[name].path) as file:
            return file.get_tensor(name)


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
