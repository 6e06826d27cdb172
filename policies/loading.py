"""Checkpoint in, parameter tree out: one leaf at a time, so the host never holds more than the tree and two tensors."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import Params, leaf_specs, unflatten
from dsjax.quantization import QuantizedArray
from dsjax.sharding import named_sharding
from policies.base import Leaf, read_leaves
from policies.sources import hub
from policies.sources.gguf import GgufFile
from policies.sources.safetensors import HfFolder

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    id_or_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    quantize: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """Load a checkpoint as a parameter tree.

    Args:
      id_or_path: a hub id, a Hugging Face folder (config.json and safetensors), or a `.gguf` file.
      dtype: of plain leaves, and what quantized ones read as: float32, bfloat16 or float16; `None` takes float32 on a
        CPU and bfloat16 elsewhere.
      quantize: `None` keeps quantized tensors as the file holds them; `"none"` dequantizes everything to `dtype`.
      mesh: devices to spread the leaves over by their logical axes; `None` takes the default device.

    Returns:
      The tree, not fused (see `dsjax.prepare`), on its devices.

    Raises:
      ConfigError: the architecture, a config field, `dtype` or `quantize` is not supported.
      CheckpointError: the checkpoint is missing, damaged, or does not fit its config.
    """
    if quantize not in (None, "none"):
        raise ConfigError(
            f"quantize={quantize!r} is not supported; None (keep what the file holds) and 'none' (dequantize) are"
        )
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} is not a dtype; supported are: {', '.join(_DTYPES)}") from error
    if dtype.name not in _DTYPES:
        raise ConfigError(f"dtype={dtype.name} is not supported; supported are: {', '.join(_DTYPES)}")

    source = _open(id_or_path)
    config, specs = source.config, leaf_specs(source.config)
    steps = source.weights.fit(config, source.shapes(), source.origin)
    leaves = {}
    for path, leaf in read_leaves(steps, config, source):
        leaves[path] = _place(leaf, dtype, quantize == "none", specs[path].axes, mesh)
        del leaf  # before the next tensor is read
    return unflatten({path: leaves[path] for path in specs}, config)


def load_config(id_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a checkpoint, without its weights.

    Args:
      id_or_path: as for `load`.

    Raises:
      ConfigError: the architecture or a config field is not supported.
      CheckpointError: the checkpoint is missing or damaged.
    """
    return _open(id_or_path).config


def _open(id_or_path: str | os.PathLike[str]) -> GgufFile | HfFolder:
    path = hub.resolve(id_or_path)
    if path.is_dir():
        return HfFolder(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder that holds it, with its config.json: {path.parent}")
    return GgufFile(path)


def _place(leaf: Leaf, dtype: np.dtype, plain: bool, axes: tuple[str, ...], mesh: jax.sharding.Mesh | None) -> Any:
    """A leaf on its devices in its final dtype; returns when the host's copy is no longer needed."""

    def put(part: np.ndarray) -> jax.Array:
        return jax.device_put(part, None if mesh is None else named_sharding(mesh, axes, part.shape))

    if not isinstance(leaf, QuantizedArray):
        return put(leaf.astype(dtype, copy=False)).block_until_ready()
    quantized = jax.block_until_ready(jax.tree.map(put, leaf.astype(dtype)))
    if not plain:
        return quantized
    sharding = None if mesh is None else named_sharding(mesh, axes, quantized.shape)
    return _dequantize(sharding)(quantized).block_until_ready()


@functools.cache
def _dequantize(sharding: jax.sharding.Sharding | None):
    """Dequantization compiled, so that the float32 intermediates never exist."""
    return jax.jit(lambda leaf: leaf.dequantize(), out_shardings=sharding)
