"""Hugging Face folders: config.json beside one or many files of weights, safetensors or torch."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from dsjax.quantization import QuantizedArray
from policies import registry
from policies.base import Shape, WeightMap
from policies.ops import Turned
from policies.quantized import Assembled, assemble
from policies.quantized.format import QuantizedTensor
from policies.sources import towers
from policies.sources.files import FileTensor, check_kind, read_json
from policies.sources.safetensors import read_header
from policies.sources.torch_file import TorchFile

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_MOST = 2**14  # layers, or experts of one
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")


def _read_file(path: Path) -> dict[str, FileTensor]:
    return TorchFile(path).tensors() if path.suffix in _TORCH_SUFFIXES else read_header(path)


def read_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], origin: str, tower: str | None = None
) -> ModelConfig:
    """Configuration from Hugging Face's two dictionaries.

    Args:
      raw: what config.json holds.
      generation: what generation_config.json holds; the ids that end a generation come from there if it has any.
      origin: for messages.
      tower: which one, of a model that has several.

    Raises:
      ConfigError: the architecture or one of its fields is not supported.
    """
    try:
        raw = towers.config_of(raw, tower)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if generation.get("eos_token_id") is not None:
        raw["eos_token_id"] = generation["eos_token_id"]
    if raw.get("bos_token_id") is None:
        raw["bos_token_id"] = generation.get("bos_token_id")
    try:
        if raw.get("model_type") is None:
            raise ConfigError("config field model_type is missing; it names the architecture")
        for name, value in raw.items():
            # Each layer and expert has leaves of its own: names for a billion would fill the memory.
            if ("layer" in name or "expert" in name) and isinstance(value, int) and value > _MOST:
                raise ConfigError(f"config field {name}={value} is more than any model has")
        return registry.get(str(raw["model_type"])).read_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: a field has a value of the wrong kind ({error})") from error


class HfFolder:
    """A Hugging Face checkpoint folder; tensors are read one at a time.

    Args:
      path: the folder.
      file: the one file in it that holds the weights; `None` finds them by the names that transformers gives.
      tower: which one, of a model that has several.

    Attributes:
      SUFFIXES: of files that can hold the weights.

    Raises:
      CheckpointError: there is no config.json.
    """

    SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)

    def __init__(self, path: Path, file: Path | None = None, tower: str | None = None):
        self.path, self.file, self._tower = Path(path), file, tower
        if not (self.path / "config.json").is_file():
            if file is None:
                raise CheckpointError(f"{self.path}: {_what_is_there(self.path)}")
            raise CheckpointError(f"{file}: there is no config.json beside it; copy it there, or give its folder")

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.file or self.path)

    @functools.cached_property
    def _raw(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration: config.json, with the ids that end a generation from generation_config.json if it has any.

        Raises:
          ConfigError: the architecture or one of its fields is not supported.
          CheckpointError: a file can not be read.
        """
        generation = self.path / "generation_config.json"
        config = read_config(
            self._raw,
            read_json(generation) if generation.is_file() else {},
            str(self.path / "config.json"),
            self._tower,
        )
        weights = registry.get(config.model_type).weights
        return weights.present(config, self.tensors) if weights.optional else config

    @property
    def weights(self) -> WeightMap:
        """The map from this family's tensor names to leaves."""
        return registry.get(self.config.model_type).weights.without(self._assembled.spare)

    @property
    def tensors(self) -> dict[str, FileTensor | QuantizedTensor]:
        """Every tensor of the model by name; a quantized weight is one.

        Raises:
          ConfigError: the model has several towers, and which is not said; or it is quantized in a way that is not
            read.
          CheckpointError: a file is missing, truncated or damaged, lacks a tensor that the index promises, or holds one
            that another file holds too.
        """
        return self._assembled.tensors

    @functools.cached_property
    def _assembled(self) -> Assembled:
        tensors = towers.tensors_of(self._raw, self._tower, self._stored_tensors())
        try:
            return assemble(tensors, self._raw.get("quantization_config"))
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"{self.origin}: {error}") from error

    def _stored_tensors(self) -> dict[str, FileTensor]:
        if self.file is not None:
            return _read_file(self.file)
        for single in ("model.safetensors", "pytorch_model.bin"):
            path = self.path / single
            index = self.path / f"{single}.index.json"
            if path.is_file():
                return _read_file(path)
            if index.is_file():
                return self._indexed(index)
            if single == "model.safetensors" and (shards := self._numbered()):
                return _merged(shards)
        raise CheckpointError(f"{self.path}: {_what_is_there(self.path)}")

    def _numbered(self) -> list[Path]:
        """Shards that lack their index, all of them."""
        matches = [match for path in self.path.iterdir() if (match := _SHARD.fullmatch(path.name))]
        if not matches:
            return []
        count = int(matches[0][2])
        if sorted((int(match[1]), int(match[2])) for match in matches) != [(i + 1, count) for i in range(count)]:
            raise CheckpointError(
                f"{self.path}: holds {len(matches)} of {count} shards ({matches[0][0]}, …) and no index; fetch the "
                "checkpoint again"
            )
        return sorted(self.path / match[0] for match in matches)

    def _indexed(self, index: Path) -> dict[str, FileTensor]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise CheckpointError(f"{index}: has no 'weight_map' from tensors to files")
        suffixes = _TORCH_SUFFIXES if index.name.startswith("pytorch") else (".safetensors",)
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or "\0" in name:
                raise CheckpointError(f"{index}: names a shard outside of the folder: {name!r}")
            if not name.endswith(suffixes):
                raise CheckpointError(f"{index}: names {name!r} as a shard, which is not a {suffixes[0]} file")
        tensors = _merged([self.path / name for name in names])
        for tensor, shard in places.items():
            if tensor not in tensors or tensors[tensor].path.name != shard:
                raise CheckpointError(f"{index}: promises tensor '{tensor}' in '{shard}', which lacks it")
        return tensors

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def stored(self, name: str) -> tuple[str, int]:
        """The dtype of one tensor as safetensors spells it, of a quantized one its scheme, and its size in bytes.

        Raises:
          CheckpointError: the dtype is not read; it is named.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, FileTensor):
            check_kind(tensor.kind, f"{tensor.path}: tensor '{name}'")
        return tensor.kind, tensor.nbytes

    def read(self, name: str) -> np.ndarray | QuantizedArray | Turned:
        """One tensor in memory of its own: float32, float16 or bfloat16 as stored, or a quantized leaf of such arrays.

        Raises:
          CheckpointError: the file is missing or was damaged since its header was read.
        """
        return self.tensors[name].read()


def _merged(shards: list[Path]) -> dict[str, FileTensor]:
    """The tensors of all shards."""
    tensors: dict[str, FileTensor] = {}
    for shard in shards:
        for name, tensor in _read_file(shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{shard}: holds tensor '{name}', which '{tensors[name].path.name}' holds too; fetch the "
                    "checkpoint again into an empty folder"
                )
            tensors[name] = tensor
    return tensors


def _what_is_there(path: Path) -> str:
    """Why a folder is no checkpoint, and what to do with what it does hold."""
    names = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"holds GGUF files; give the path of one of them, such as {path / ggufs[0]}"
    if "config.json" in names:
        files = [name for name in names if name.endswith(HfFolder.SUFFIXES)]
        if files:
            return f"has no weights by the names that transformers gives; give the file, such as {path / files[0]}"
        need = "model.safetensors, pytorch_model.bin, or an index of either"
    else:
        need = "config.json"
    return f"there is no {need} in this folder, which holds: {', '.join(names[:10]) or 'nothing'}"
