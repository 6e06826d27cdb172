"""Checkpoints that are in memory already: a live torch module, or a dictionary of arrays under a checkpoint's names."""

import dataclasses
import functools
import math
from collections.abc import Mapping
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
from policies.sources.files import DTYPES, FLOATS, aligned_empty, check_kind
from policies.sources.hf_folder import read_config

_KINDS = {str(dtype): kind for kind, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class HeldTensor:
    """A tensor of torch, numpy or JAX.

    Attributes:
      name: for messages.
      tensor: the array.
    """

    name: str
    tensor: Any

    @property
    def dtype(self) -> str:
        """Its dtype as its library spells it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def kind(self) -> str:
        """Its dtype as safetensors spells it, where it does."""
        return _KINDS.get(self.dtype, self.dtype)

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Its size, of a dtype that is read."""
        return math.prod(self.shape) * DTYPES[self.kind].itemsize

    def read(self) -> np.ndarray:
        """A copy: what is trained on in place later must not change the tree.

        Raises:
          CheckpointError: the tensor has no values.
        """
        if getattr(self.tensor, "is_meta", False):
            raise CheckpointError(f"tensor '{self.name}' is on torch's meta device and has no values")
        array = _as_numpy(self.tensor)
        copy = aligned_empty(array.shape, array.dtype)
        np.copyto(copy, array)
        return copy


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
        held = {name: HeldTensor(name, tensor) for name, tensor in tensors.items()}
        self._held, self._raw = towers.tensors_of(raw, tower, held), raw
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

    @functools.cached_property
    def _assembled(self) -> Assembled:
        try:
            return assemble(self._held, self._raw.get("quantization_config"))
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"{self.origin}: {error}") from error

    @property
    def tensors(self) -> dict[str, HeldTensor | QuantizedTensor]:
        """Every tensor of the model by name; a quantized weight is one.

        Raises:
          ConfigError: it is quantized in a way that is not read.
          CheckpointError: a quantized weight lacks one of its tensors.
        """
        return self._assembled.tensors

    @property
    def weights(self) -> WeightMap:
        """The map from this family's tensor names to leaves."""
        return registry.get(self.config.model_type).weights.without(self._assembled.spare)

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def stored(self, name: str) -> tuple[str, int]:
        """The dtype of one tensor as safetensors spells it, of a quantized one its scheme, and its size in bytes.

        Raises:
          CheckpointError: the dtype is not read, or the tensor has no values; it is named.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, HeldTensor):
            check_kind(tensor.kind if tensor.kind in FLOATS else tensor.dtype, f"{self.origin}: tensor '{name}'")
            if getattr(tensor.tensor, "is_meta", False):
                raise CheckpointError(f"{self.origin}: tensor '{name}' is on torch's meta device and has no values")
        return tensor.kind, tensor.nbytes

    def read(self, name: str) -> np.ndarray | QuantizedArray | Turned:
        """A copy of one tensor; a quantized one as a leaf of numpy arrays."""
        return self.tensors[name].read()


def _as_numpy(tensor: Any) -> np.ndarray:
    """The same memory as a numpy array where it is on the host."""
    if not type(tensor).__module__.startswith("torch"):
        return np.asarray(tensor)
    import torch  # whoever has a tensor has torch

    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.bfloat16 or name.startswith("float8"):  # numpy knows none of these
        bits = tensor.contiguous().view(torch.uint16 if tensor.itemsize == 2 else torch.uint8)
        return bits.numpy().view(DTYPES[_KINDS[name]])
    return tensor.numpy()
