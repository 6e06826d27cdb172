"""How much memory there is, how much was used, and how many pages fit beside a model."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig

USABLE = 0.9  # of a memory; the rest is for programs, gaps, and whoever else uses it


def pages_that_fit(budget: int, taken: int, page: int) -> int:
    """Pages in what is left of a budget; 0 also where what is taken does not fit itself."""
    return max(0, budget - taken) // page


def kv_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of the keys and values of one token in all layers."""
    latent = config.latent
    values = 2 * config.num_kv_heads * config.head_dim if latent is None else latent.kv_rank + latent.rope_size
    return config.num_layers * values * jnp.dtype(dtype).itemsize


def available(device: Any = None) -> tuple[str, int]:
    """The memory that models run in, by name and in bytes: of a device, or of this machine or container.

    Args:
      device: a `jax.Device`; `None` for the first.
    """
    device = device or jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return device.device_kind, stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or its limit is the word "max"
        pass
    return f"this machine ({device.platform})", total


def in_use(device: Any = None) -> int:
    """Bytes of a device's memory that arrays of this process hold; 0 where it does not tell.

    Args:
      device: which; `None` for the first.
    """
    device = device or jax.devices()[0]
    return (device.memory_stats() or {}).get("bytes_in_use", 0)


def peak() -> tuple[int, int | None]:
    """Most bytes that this process used so far: resident on the host, and on the first device if it tells."""
    stats = jax.devices()[0].memory_stats() or {}
    return _peak_resident(), stats.get("peak_bytes_in_use")


def _peak_resident() -> int:
    # Linux starts ru_maxrss at that of the parent; VmHWM is this process's own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readable(nbytes: float) -> str:
    """A size in the largest decimal unit that keeps it above one: `123.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
