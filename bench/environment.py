"""What a result needs beside it to be believed: machine, versions, revision, command."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any


def environment(packages: tuple[str, ...] = ("jax", "jaxlib", "torch", "transformers")) -> dict[str, Any]:
    """The environment of this run, as JSON can hold it."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m bench.{pathlib.Path(sys.argv[0]).stem}", *map(_relative, sys.argv[1:])]),
        "revision": _revision(),
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ},
    }


def _relative(argument: str) -> str:
    """An argument without the folder of this machine that the project lies in."""
    return argument.replace(f"{pathlib.Path(__file__).resolve().parents[1]}{os.sep}", "")


def _revision() -> str | None:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
