"""Which backend of an op runs: decided at trace time from the GPU that is compiled for, the shapes and the dtypes."""

import dataclasses
import functools
import importlib
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Backends that may run on a machine with no NVIDIA GPU.
PORTABLE = ("xla", "reference")
OLDEST = (8, 0)  # XLA's Triton knows nothing older
VARIABLE = "PALLAS_KERNELS"
TABLES = pathlib.Path(__file__).parent / "tuning"

# Capability by what `device_kind` holds, longest names first; an unknown kind counts as the oldest that runs kernels.
_CAPABILITIES = {
    "RTX PRO": (12, 0),
    "RTX 50": (12, 0),
    "RTX 40": (8, 9),
    "A100": (8, 0),
    "A800": (8, 0),
    "A30": (8, 0),
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "H20": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "B100": (10, 0),
    "B300": (10, 3),
    "L40": (8, 9),
    "A10": (8, 6),
    "A40": (8, 6),
    "L4": (8, 9),
    "T4": (7, 5),
    "V100": (7, 0),
    "P100": (6, 0),
}


class UnsupportedError(ValueError):
    """The backend that was asked for can not run here; the message gives every reason."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The NVIDIA GPU that a program is traced for."""

    kind: str
    capability: tuple[int, int]
    cores: int


def current_gpu() -> Gpu | None:
    """The GPU that is compiled for: of the mesh in context, there or not, else the default device; `None` on a CPU."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        if described.platform == "cpu":
            return None
        return Gpu(described.device_kind, capability_of(described.device_kind), described.num_cores or 1)
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return _present_gpu(device.platform if hasattr(device, "platform") else device)


@functools.cache
def _present_gpu(platform: str | None) -> Gpu | None:
    device = jax.local_devices(backend=platform)[0]
    if device.platform != "gpu":
        return None
    # PJRT names both on NVIDIA GPUs.
    capability = getattr(device, "compute_capability", None)
    major, minor = map(int, capability.split(".")) if capability else capability_of(device.device_kind)
    return Gpu(device.device_kind, (major, minor), getattr(device, "core_count", 1))


def capability_of(kind: str) -> tuple[int, int]:
    """Compute capability of a GPU by what JAX calls it."""
    for part, capability in sorted(_CAPABILITIES.items(), key=lambda item: -len(item[0])):
        if part in kind:
            return capability
    logger.warning("GPU %r is not known; it is treated as capability %d.%d", kind, *OLDEST)
    return OLDEST


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def choose(op: str, refusals: Mapping[str, Sequence[str]], implementation: str | None, gpu: Gpu | None = None) -> str:
    """Choose the backend of an op.

    Args:
      op: its name, for messages and for the environment variable.
      refusals: for each backend, best first, why it can not run this call; nothing if it can.
      implementation: a backend by name, or `None` for the first that can run.
      gpu: what is compiled for; `current_gpu()` if not given.

    The variable `PALLAS_KERNELS` overrides the default choice: `PALLAS_KERNELS=xla`, or by op
    `PALLAS_KERNELS=ragged_paged_attention=triton,rotary_page_write=xla`. It is read while a program is traced.

    Returns:
      The backend's name.

    Raises:
      UnsupportedError: no such backend, or it can not run; the message lists all reasons.
    """
    wanted = implementation or _from_environment(op)
    if wanted is not None:
        if wanted not in refusals:
            raise UnsupportedError(f"{op}: implementation={wanted!r} is unknown; there are {sorted(refusals)}")
        if refusals[wanted]:
            raise UnsupportedError(f"{op}: implementation={wanted!r} can not run: {'; '.join(refusals[wanted])}")
        return wanted
    gpu = current_gpu() if gpu is None else gpu
    if gpu is not None and gpu.capability < OLDEST:
        _say_once(f"{gpu.kind} is older than compute capability 8.0: attention runs as plain XLA, correct but slower")
    for name, reasons in refusals.items():
        # Interpreted kernels are for tests: they are never the best that a CPU has.
        if not reasons and (gpu is not None or name in PORTABLE):
            logger.debug("%s: %s on %s", op, name, gpu)
            return name
    raise UnsupportedError(f"{op}: no backend can run: {dict(refusals)}")


def _from_environment(op: str) -> str | None:
    for part in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, _, value = part.rpartition("=")
        if name in ("", op):
            return value
    return None


def select(api: str, backends: Sequence[str], implementation: str | None, *args: Any, **options: Any) -> Any:
    """Choose the backend of a call among the modules of an op's package; see `choose`.

    Args:
      api: `__name__` of a module of the package, `pallas_kernels.OP.api`.
      backends: names of its modules, best first. One that can not run everything has `refusals(*args, **options, gpu)`.
      implementation: a backend by name, or `None`.
      *args: what `refusals` takes.
      **options: the same.

    Returns:
      The module.
    """
    gpu = current_gpu()
    package = api.rpartition(".")[0]

    def ask(module):
        return module.refusals(*args, **options, gpu=gpu) if hasattr(module, "refusals") else []

    name = choose(package.rpartition(".")[2], _Refusals(package, backends, gpu, ask), implementation, gpu)
    return _backend(package, name)


def _backend(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


class _Refusals(Mapping):
    """Why each backend can not run; only those that are looked at are imported.

    On a CPU the portable ones come first: no other is ever its best, and Pallas takes a third of a second to import.
    """

    def __init__(self, package: str, backends: Sequence[str], gpu: Gpu | None, ask: Callable[[Any], list[str]]):
        self.package, self.ask = package, ask
        self.names = backends if gpu else sorted(backends, key=lambda name: name not in PORTABLE)

    def __getitem__(self, name: str) -> list[str]:
        return self.ask(_backend(self.package, name))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def prefers_kernels(implementation: str | None) -> bool:
    """Whether a call with this `implementation` would run a Pallas kernel if one can."""
    if implementation is not None:
        return implementation not in PORTABLE
    gpu = current_gpu()
    return gpu is not None and gpu.capability >= OLDEST


def triton_refusals(gpu: Gpu | None) -> list[str]:
    """Why no Triton kernel can run on a GPU; on a CPU they are interpreted."""
    if gpu is not None and gpu.capability < OLDEST:
        return [f"{gpu.kind} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, Triton needs 8.0"]
    return []


@functools.cache
def _table(op: str) -> list[dict[str, Any]]:
    path = TABLES / f"{op}.json"
    return json.loads(path.read_text())["entries"] if path.exists() else []


def tuned(op: str, gpu: Gpu | None, **shape: Any) -> dict[str, Any]:
    """Tuned block sizes of an op, from `pallas_kernels/tuning/{op}.json`.

    Args:
      op: its name.
      gpu: what is compiled for.
      **shape: what the table is keyed by; all of it must be equal to an entry's `shape`.

    Returns:
      The entry's `config`, empty where the table is silent.
    """
    if gpu is None:
        return {}
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    for entry in _table(op):
        if entry["capability"] == capability and entry["shape"] == shape:
            return entry["config"]
    return {}
