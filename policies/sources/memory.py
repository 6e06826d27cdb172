"""Checkpoints that are in memory already: a live torch module, or a dictionary of arrays under a checkpoint's names."""

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from policies import registry
from policies.base import Shape, WeightMap
from policies.sources import towers
from policies.sources.files import FLOATS, aligned_empty, check_kind
from policies.sources.hf_folder import read_config

_KINDS = {str(dtype): kind for kind, dtype in FLOATS.items()}


class InMemory:
    """Tensors of a dictionary with a configuration.

    Args:
      tensors: torch tensors, numpy or JAX arrays by the names that a Hugging Face checkpoint of this family has.
      config: the parsed config.json, or a `ModelConfig`.
      generation: the parsed generation_config.json.
      origin: what this is, for messages.
      tower: which one, of a model that has several.

    Raises:
      CheckpointError: something in the dictionary is not an array.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        config: ModelConfig | Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        origin: str = "state dict",
        tower: str | None = None,
    ):
        for name, tensor in tensors.items():
            if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
                raise CheckpointError(
                    f"{origin}: '{name}' is a {type(tensor).__name__}, not an array; a nested tree is loaded by "
                    "dsjax.from_tree"
                )
        if not isinstance(config, ModelConfig | Mapping):
            raise ConfigError(f"config is a {type(config).__name__}; give a ModelConfig or the parsed config.json")
        raw = {} if isinstance(config, ModelConfig) else config
        self.tensors = towers.tensors_of(raw, tower, tensors)
        self._config, self._generation, self.origin, self._tower = config, generation or {}, origin, tower

    @classmethod
    def from_module(cls, module: Any, tower: str | None = None) -> "InMemory":
        """The weights of a live `transformers` model.

        Args:
          module: has `state_dict()` and a `config` with `to_dict()`.
          tower: which one, of a model that has several.
        """
        generation = getattr(module, "generation_config", None)
        return cls(
            module.state_dict(),
            module.config.to_dict(),
            generation.to_dict() if generation is not None else None,
            type(module).__name__,
            tower,
        )

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration.

        Raises:
          ConfigError: the architecture or one of its fields is not supported.
        """
        if isinstance(self._config, ModelConfig):
            return self._config
        config = read_config(dict(self._config), self._generation, f"{self.origin}, config", self._tower)
        return registry.get(config.model_type).weights.present(config, self.tensors)

    @property
    def weights(self) -> WeightMap:
        """The map from this family's tensor names to leaves."""
        return registry.get(self.config.model_type).weights

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def stored(self, name: str) -> tuple[str, int]:
        """The dtype of one tensor as safetensors spells it, and its size in bytes.

        Raises:
          CheckpointError: the dtype is not read, or the tensor has no values; it is named.
        """
        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        check_kind(_KINDS.get(dtype, dtype), f"{self.origin}: tensor '{name}'")
        if getattr(tensor, "is_meta", False):
            raise CheckpointError(f"{self.origin}: tensor '{name}' is on torch's meta device and has no values")
        return _KINDS[dtype], int(np.prod(tensor.shape, dtype=np.int64)) * FLOATS[_KINDS[dtype]].itemsize

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor: what is trained on in place later must not change the tree."""
        array = _as_numpy(self.tensors[name])
        copy = aligned_empty(array.shape, array.dtype)
        np.copyto(copy, array)
        return copy


def _as_numpy(tensor: Any) -> np.ndarray:
    """The same memory as a numpy array where it is on the host."""
    if not type(tensor).__module__.startswith("torch"):
        return np.asarray(tensor)
    import torch  # whoever has a tensor has torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
