"""How much memory there is, how much was used, and how many pages fit beside a model."""

import dataclasses
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig

USABLE = 0.9  # of a memory; the rest is for temporaries, programs, and whoever else uses it


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a memory is divided while a model runs in it; sizes in bytes.

    Attributes:
      memory: all there is.
      weights: the parameters in the form that runs.
      token: keys and values of one token in all layers.
      page_size: tokens a page.
    """

    memory: int
    weights: int
    token: int
    page_size: int = 64

    @property
    def pages(self) -> int:
        """Pages that fit beside the weights; 0 also when the weights alone do not fit."""
        return max(0, int(self.memory * USABLE) - self.weights) // (self.token * self.page_size)

    @property
    def tokens(self) -> int:
        """Tokens that these pages hold."""
        return self.pages * self.page_size


def kv_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of the keys and values of one token in all layers."""
    latent = config.latent
    values = 2 * config.num_kv_heads * config.head_dim if latent is None else latent.kv_rank + latent.rope_size
    return config.num_layers * values * jnp.dtype(dtype).itemsize


def available() -> tuple[str, int]:
    """The memory that models run in, by name and in bytes: of the first device, or of this machine or container."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return device.device_kind, stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or its limit is the word "max"
        pass
    return f"this machine ({device.platform})", total


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
