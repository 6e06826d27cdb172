"""Headers of safetensors files. Format: https://github.com/huggingface/safetensors#format."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsjax.errors import CheckpointError
from policies.sources.files import FileTensor, read_json, require_file

__all__ = ["read_header", "read_json"]


def read_header(path: Path) -> dict[str, FileTensor]:
    """Tensors of one safetensors file by name.

    Raises:
      CheckpointError: the file is missing, truncated, or not safetensors.
    """
    require_file(path)
    try:
        # The package checks that offsets, shapes and dtypes agree and that tensors fill the file; it tells no offsets.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
            size = file.seek(0, 2)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from error
    except (RecursionError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: can not be read ({error}); the file is truncated or damaged, fetch it again"
        ) from error
    entries.pop("__metadata__", None)
    return {
        name: FileTensor(path, size, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
