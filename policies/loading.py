"""Checkpoint in, parameter tree out: leaf by leaf, so the host never holds more than the tree and two tensors.

Threads read ahead, cast and quantize; the caller's thread puts what they hand over on the devices, in order. What is
read and not yet placed stays below the largest leaf's share of the file, so several small tensors are read side by
side, and of a large one several pieces.
"""

import collections
import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.std import tqdm

from dsjax import checkpoint
from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from dsjax.params import Params, flatten, leaf_dtype, leaf_sharding, leaf_specs, logical_axes, unflatten
from dsjax.quantization import QuantizedArray, Recipe, Scheme
from dsjax.quantization.rounding import Fit
from dsjax.sharding import named_sharding
from dsjax.watched import is_watched
from policies.base import Leaf, Step, read_leaves
from policies.quantizing import check_recipe, quantized_in_pieces, schemes_of_leaves
from policies.sources import hub
from policies.sources.blocks import KINDS, quantize_matrix
from policies.sources.files import aligned_empty
from policies.sources.gguf import GgufFile
from policies.sources.hf_folder import HfFolder
from policies.sources.megatron import MegatronFolder
from policies.sources.memory import InMemory
from policies.sources.meta import MetaFolder

# What they share: `origin`, `config`, `weights`, `shapes()`, `read(name)`, and `stored(name)` for format and bytes.
Checkpoint = GgufFile | HfFolder | InMemory | MegatronFolder | MetaFolder

_DTYPES = ("float32", "bfloat16", "float16")
_READERS = 4
_SECONDS = 2.0  # of loading before a bar appears by itself


def load(
    model: Any,
    *,
    config: ModelConfig | Mapping[str, Any] | None = None,
    tower: str | None = None,
    dtype: Any = None,
    quantize: Recipe | None = None,
    fit: Fit = "nearest",
    mesh: jax.sharding.Mesh | None = None,
    progress: bool | None = None,
) -> Params:
    """Load a checkpoint as a parameter tree.

    Args:
      model: a hub id; a folder that `dsjax.save` wrote; a Hugging Face folder (config.json and safetensors or torch
        files) or one file of weights in it; a folder of Meta's (params.json and consolidated.*.pth) or Megatron-LM's
        (mp_rank_*); a `.gguf` file; a live `transformers` model; or a dictionary of torch tensors, numpy or JAX arrays
        by the names of a Hugging Face checkpoint.
      config: for a dictionary: its `ModelConfig`, or what its config.json holds.
      tower: of a checkpoint that holds several models, which one: `"text"` of Gemma 3; of CLIP `"text"` (see
        `dsjax.encode`) or `"vision"` (see `dsjax.encode_image`).
      dtype: of plain leaves, and what quantized ones read as: float32, bfloat16 or float16; `None` takes float32 on a
        CPU and bfloat16 elsewhere, and of a folder that `dsjax.save` wrote what was saved.
      quantize: `None` keeps tensors as the checkpoint holds them; `"none"` dequantizes everything to `dtype`. Else a
        scheme, such as `"int4"` or `"fp8"`, or a recipe, as for `dsjax.quantize`: leaves are quantized one by one as
        they come. `"q8_0"`, `"q4_0"` and `"q4_1"` leave matrices alone whose rows are no whole blocks of GGUF's.
      fit: how scales are found for `quantize`: `"nearest"`, or `"hqq"`, whose error is smaller and which takes longer.
      mesh: devices to spread the leaves over by their logical axes; `None` takes the default device.
      progress: whether to show a bar with bytes a second; `None` shows it on a terminal or in a notebook when loading
        takes more than two seconds.

    Returns:
      The tree, not fused (see `dsjax.prepare`), on its devices.

    Raises:
      ConfigError: the architecture, a config field, `config`, `dtype`, `quantize` or `fit` is not supported.
      CheckpointError: the checkpoint is missing, damaged, or does not fit its config.
    """
    check_recipe(quantize, fit)
    if dtype is not None:
        dtype = _checked_dtype(dtype)
    if (folder := _saved(model)) is not None:
        return _restore(folder, dtype, quantize, mesh)
    dtype = dtype or jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")

    source = open_checkpoint(model, config, tower)
    architecture, specs = source.config, leaf_specs(source.config)
    schemes = schemes_of_leaves(quantize, {path: spec.shape for path, spec in specs.items()})
    shapes = source.shapes()
    steps = source.weights.fit(architecture, shapes, source.origin)
    places = {tensor: i for i, tensor in enumerate(shapes)}
    steps.sort(key=lambda step: places[step.tensors[0]])  # as they lie in the file: disks read ahead too
    sizes = [sum(source.stored(tensor)[1] for tensor in step.tensors) for step in steps]

    def read(step: Step) -> list[tuple[str, Leaf]]:
        return [
            (path, _convert(leaf, path, dtype, schemes.get(path), fit))
            for path, leaf in read_leaves([step], architecture, source)
        ]

    leaves = {}
    with _bar(sum(sizes), progress) as bar:
        for pairs, size in _read_ahead(steps, sizes, read):
            while pairs:
                path, leaf = pairs.pop()
                placed = _place(leaf, quantize == "none", specs[path].axes, mesh)
                if (to := schemes.get(path)) is not None and not _is_stored(placed, to):
                    placed = quantized_in_pieces(placed, to, fit, dtype, f"leaf '{path}'")
                    placed = jax.block_until_ready(
                        jax.device_put(placed, leaf_sharding(placed, specs[path].axes, mesh))
                    )
                leaves[path] = placed
                del leaf, placed  # before the next one is waited for
            bar.update(size)
    return unflatten({path: leaves[path] for path in specs}, architecture)


def _checked_dtype(dtype: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} is not a dtype; supported are: {', '.join(_DTYPES)}") from error
    if dtype.name not in _DTYPES:
        raise ConfigError(f"dtype={dtype.name} is not supported; supported are: {', '.join(_DTYPES)}")
    return dtype


def _saved(model: Any) -> Path | None:
    """The folder of a tree that `dsjax.save` wrote, if this is one."""
    return checkpoint.saved_folder(model) if isinstance(model, str | os.PathLike) else None


def _restore(folder: Path, dtype: np.dtype | None, quantize: Recipe | None, mesh: jax.sharding.Mesh | None) -> Params:
    """A saved tree, dequantized if asked."""
    if quantize not in (None, "none"):
        raise ConfigError(
            f"quantize={quantize!r}: {folder} was saved by dsjax.save and is loaded as it is, or with quantize='none'; "
            "quantize the checkpoint that it was made from"
        )
    params = checkpoint.restore(folder, dtype=dtype, mesh=mesh)
    if quantize is None:
        return params
    axes, leaves = logical_axes(params), flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, QuantizedArray):
            sharding = None if mesh is None else named_sharding(mesh, axes[path], leaf.shape)
            leaves[path] = _dequantize(sharding)(leaf)
    return unflatten(leaves, params.config)


def load_config(
    model: Any, *, config: ModelConfig | Mapping[str, Any] | None = None, tower: str | None = None
) -> ModelConfig:
    """The configuration of a checkpoint, without its weights.

    Args:
      model: as for `load`.
      config: as for `load`.
      tower: as for `load`.

    Raises:
      ConfigError: the architecture or a config field is not supported.
      CheckpointError: the checkpoint is missing or damaged.
    """
    if (folder := _saved(model)) is not None:
        return checkpoint.saved_shapes(folder).config
    return open_checkpoint(model, config, tower).config


def open_checkpoint(
    model: Any, config: ModelConfig | Mapping[str, Any] | None = None, tower: str | None = None
) -> Checkpoint:
    """A checkpoint by what it is; nothing but the presence of its config is looked at.

    Args:
      model: as for `load`.
      config: as for `load`.
      tower: as for `load`.

    Raises:
      ConfigError: a dictionary comes without `config`, or something else with one.
      CheckpointError: there is no such checkpoint.
    """
    if isinstance(model, Mapping):
        if config is None:
            raise ConfigError("a dictionary of arrays needs config=, a ModelConfig or what its config.json holds")
        return InMemory(model, config, tower=tower)
    if config is not None:
        raise ConfigError("config= goes with a dictionary of arrays; every other checkpoint has its own")
    if hasattr(model, "state_dict") and hasattr(model, "config"):
        return InMemory.from_module(model, tower)
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"a {type(model).__name__} can not be loaded; give a path, a hub id, a transformers model, or a dictionary "
            "of arrays with config="
        )
    path = hub.resolve(model)
    if path.is_dir():
        if (path / "config.json").is_file():
            return HfFolder(path, tower=tower)
        if (path / "params.json").is_file():
            return MetaFolder(path)
        return MegatronFolder(path) if MegatronFolder.is_one(path) else HfFolder(path)
    return HfFolder(path.parent, path, tower) if path.suffix in HfFolder.SUFFIXES else GgufFile(path)


def _read_ahead(
    steps: Sequence[Step], sizes: Sequence[int], read: Callable[[Step], list[tuple[str, Leaf]]]
) -> Iterator[tuple[list[tuple[str, Leaf]], int]]:
    """What `read` makes of each step, in order, and the step's size; later ones are being read meanwhile."""
    pending: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()
    most, held = max(sizes, default=0), 0
    pool = concurrent.futures.ThreadPoolExecutor(_READERS, "dsjax-load")
    try:
        for step, size in zip(steps, sizes, strict=True):
            while pending and (held + size > most or len(pending) == 2 * _READERS):
                held -= pending[0][1]
                yield _take(pending)
            pending.append((pool.submit(read, step), size))
            held += size
        while pending:
            yield _take(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _take(pending: collections.deque[tuple[concurrent.futures.Future, int]]) -> tuple[list[tuple[str, Leaf]], int]:
    future, size = pending.popleft()
    return future.result(), size


def _bar(total: int, progress: bool | None) -> tqdm:
    return tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        disable=not (is_watched() if progress is None else progress),
        delay=0 if progress else _SECONDS,
        leave=False,
    )


def _is_stored(leaf: Any, to: Scheme) -> bool:
    return isinstance(leaf, QuantizedArray) and leaf.scheme == to


def _convert(leaf: Leaf, path: str, dtype: np.dtype, to: Scheme | None, fit: Fit) -> Leaf:
    """A leaf on the host in its final format, or, if it is quantized on the device, as it is."""
    on_host = to is not None and to.name in KINDS and fit == "nearest"
    if isinstance(leaf, QuantizedArray):
        if to is None or to == leaf.scheme or not on_host:
            return leaf.astype(dtype)
        return quantize_matrix(np.asarray(leaf.astype(np.float32).dequantize()), to.name).astype(dtype)
    if to is not None:
        return quantize_matrix(leaf, to.name).astype(dtype) if on_host else leaf
    dtype = np.dtype(leaf_dtype(path, dtype))
    if leaf.dtype == dtype:
        return leaf
    cast = aligned_empty(leaf.shape, dtype)
    np.copyto(cast, leaf, casting="unsafe")
    return cast


def _place(leaf: Leaf, plain: bool, axes: tuple[str, ...], mesh: jax.sharding.Mesh | None) -> Any:
    """A leaf on its devices; returns when the host's copy is no longer needed, or has become the leaf's memory."""
    placed = jax.block_until_ready(jax.device_put(leaf, leaf_sharding(leaf, axes, mesh)))
    if not plain or not isinstance(leaf, QuantizedArray):
        return placed
    sharding = None if mesh is None else named_sharding(mesh, axes, leaf.shape)
    return _dequantize(sharding)(placed).block_until_ready()


@functools.cache
def _dequantize(sharding: jax.sharding.Sharding | None):
    """Dequantization compiled, so that the float32 intermediates never exist."""
    return jax.jit(lambda leaf: leaf.dequantize(), out_shardings=sharding)
