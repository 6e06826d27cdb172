"""Parameter tree out: a folder that transformers loads."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dsjax.errors import CheckpointError
from dsjax.params import Params
from dsjax.quantization import QuantizedArray
from policies import registry
from policies.base import write_tensors

SHARD_BYTES = 5_000_000_000


def export_hf(params: Params, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write parameters as a Hugging Face checkpoint: config.json and safetensors, in shards with an index if large.

    The folder appears when all of it is written. Quantized leaves are written dequantized, every leaf in its own dtype.

    Args:
      params: a tree as loaded, not fused by `prepare`.
      folder: must not exist, or be empty.
      shard_bytes: most bytes of a file, unless one tensor has more.

    Returns:
      The folder.

    Raises:
      ConfigError: the family's config.json can not express this configuration.
      ParameterError: the tree does not fit its config, or was fused.
      CheckpointError: the folder has something in it, or can not be written.
    """
    folder = Path(folder)
    policy = registry.get(params.config.model_type)
    config = policy.write_config(params.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: there is something already; export to a new folder")
    tensors = ((name, np.ascontiguousarray(tensor)) for name, tensor in write_tensors(params, policy, _plain))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_shards(tensors, staging, shard_bytes)
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            staging.chmod(0o755)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can not be written: {error}") from error
    return folder


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf)


def _write_shards(tensors: Iterator[tuple[str, np.ndarray]], folder: Path, shard_bytes: int) -> None:
    """Files `model-1.safetensors`, ..., renamed once it is known how many there are."""
    places: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    count = total = 0

    def flush() -> None:
        nonlocal count, shard
        count += 1
        save_file(shard, folder / f"model-{count}.safetensors", metadata={"format": "pt"})
        shard = {}

    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        places[name] = count + 1
        total += tensor.nbytes
    flush()
    if count == 1:
        (folder / "model-1.safetensors").rename(folder / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for i, name in names.items():
        (folder / f"model-{i}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[shard] for tensor, shard in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
