"""Everything that waits for a GPU, in one command and a bounded time.

    python bench/gpu_suite.py --out DIR [--minutes 9] [--stages numerics,kernels,step,tune] [--quick] [--revision TEXT]
    python bench/gpu_suite.py --out DIR --rehearse      the same on any machine, tiny and interpreted

Stages: `numerics` checks every kernel against exact arithmetic (`bench.numerics`), `kernels` times them beside their
ceilings and rivals (`bench.kernels`), `step` whole models beside transformers (`bench.whole_model`), `tune` searches
block sizes (`bench.tune`) and leaves tables in `DIR/tuning`, to be copied to `pallas_kernels/tuning`.

Each stage runs in a process of its own and appends a line of JSON to `DIR/{stage}.jsonl` for each thing that it did,
so whatever ends the run, what was measured is there. The first line is the environment. What raises is recorded with
its traceback. What kills the process or leaves the GPU unusable is recorded as `crashed`, what takes longer than
`PATIENCE` as `hung`, and the stage goes on with the next thing in a new process. A second run with the same `--out`
goes on where the first one ended. The exit status tells whether the suite ran, not whether all was well: 1 if some
stage has no result at all, 2 without a GPU.

It needs what `import dsjax.generation` needs: jax, jaxtyping and flax (and numpy); the oracle of attention needs pytest
too. Rivals (torch, transformers, FlashInfer) are used if they are there. On a machine with no network, packages that
are missing can be unpacked into a folder and named in `PYTHONPATH`: pure Python ones need nothing more.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = {"numerics": 60, "kernels": 120, "step": 240, "tune": 240}  # seconds for one thing
MODULES = {"numerics": "numerics", "kernels": "kernels", "step": "whole_model", "tune": "tune"}
SHARES = {"numerics": 3, "kernels": 4, "step": 3, "tune": 2}  # of the time; what one leaves the next ones get
START = 30  # seconds that a process may take before its first line


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a line that is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a stage; one that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def settled(records: list[dict[str, Any]]) -> set[str]:
    """Names of what has a result or an error."""
    return {each["name"] for each in records if "name" in each}


def open_unit(records: list[dict[str, Any]]) -> str | None:
    """What was begun and has no result."""
    begun = [each["begin"] for each in records if "begin" in each]
    return begun[-1] if begun and begun[-1] not in settled(records) else None


def stage_units(stage: str, arguments: argparse.Namespace) -> tuple[list[str], Callable[[str], dict[str, Any]], Any]:
    """Names of the things of a stage, what does one, and what puts a result in words."""
    module = importlib.import_module(f"bench.{MODULES[stage]}")
    tiny = arguments.rehearse
    if stage == "kernels":
        return module.units(arguments.quick, (), tiny), functools.partial(module.run_unit, tiny=tiny), module.lines
    if stage == "tune":
        items = module.items(tiny)

        def run(name: str) -> dict[str, Any]:
            result = module.run_item(items[name], tiny)
            if result["entry"]:
                module.write_entry(arguments.out / "tuning", result["op"], result["entry"])
            return result

        return list(items), run, module.lines
    return module.units(tiny), functools.partial(module.run_unit, tiny=tiny), module.lines


def work(stage: str, arguments: argparse.Namespace) -> int:
    """The process of a stage: does what has no result yet, one thing after the other."""
    path = arguments.out / f"{stage}.jsonl"
    records = read(path)
    names, run, lines = stage_units(stage, arguments)
    if not any("environment" in each for each in records):
        append(path, {"environment": described(arguments), "units": names})
    done = settled(records)
    for name in names:
        if name in done:
            continue
        append(path, {"begin": name})
        begin = time.perf_counter()
        try:
            record = {"name": name, "result": run(name)}
            shown = lines(name, record["result"])
        except Exception as error:  # whatever happens, the next thing has its turn
            record = {"name": name, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": short_traceback()}
            shown = [f"FAIL {name}: {record['error'].splitlines()[0][:200]}"]
        append(path, record | {"seconds": time.perf_counter() - begin})
        print("\n".join(shown), flush=True)
        if "error" in record and not gpu_is_alive():
            return 3
    return 0


def short_traceback() -> str:
    """The end of the traceback, where the cause is."""
    return traceback.format_exc()[-4000:]


def gpu_is_alive() -> bool:
    """Whether the device still computes: after an illegal access nothing in the same process does."""
    import jax.numpy as jnp

    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """The environment of the run, with the GPU and what came with `--revision`, for copies without a repository."""
    import jax

    from bench.environment import environment

    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "triton", "transformers")
    try:
        found = environment(packages)
    except FileNotFoundError:  # git is not installed
        found = {"versions": {"jax": jax.__version__}}
    device = jax.devices()[0]
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = None
    return found | {
        "revision": arguments.revision or found.get("revision"),
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "nvidia-smi": smi,
        "suite_command": " ".join(sys.argv),
        "rehearsal": "the times mean nothing" if arguments.rehearse else False,
    }


def run_stage(stage: str, arguments: argparse.Namespace, deadline: float) -> str:
    """Runs the process of a stage, again after each crash, until it is through or the time is over.

    Returns:
        What came of it, in words.
    """
    path = arguments.out / f"{stage}.jsonl"
    command = [sys.executable, __file__, *sys.argv[1:], "--out", str(arguments.out), "--work", stage]
    for _ in range(50):
        process = subprocess.Popen(command, cwd=ROOT, env=environment_variables(arguments))
        ended = watch(process, path, PATIENCE[stage], deadline)
        if ended in ("done", "no GPU"):
            return ended
        records = read(path)
        name = open_unit(records)
        if ended == "out of time":
            return f"out of time{f' in {name}' if name else ''}"
        if name is None and ended != "unusable":
            return f"{ended} before it began anything"
        if name is not None:
            append(path, {"name": name, "error": ended})
            print(f"FAIL {name}: {ended}", flush=True)
    return "given up: it crashed too often"


def watch(process: subprocess.Popen, path: pathlib.Path, patience: float, deadline: float) -> str:
    """Waits for a process while lines are added to its file; else, or when the time is over, ends it."""
    size, changed = -1, time.monotonic() + START
    while True:
        try:
            status = process.wait(timeout=0.2)
            return {0: "done", 2: "no GPU", 3: "unusable"}.get(status, f"crashed with status {status}")
        except subprocess.TimeoutExpired:
            pass
        now, grown = time.monotonic(), path.stat().st_size if path.exists() else -1
        if grown != size:
            size, changed = grown, max(changed, now)
        if now > deadline or now - changed > patience:
            process.kill()
            process.wait()
            return "out of time" if now > deadline else f"hung for {patience} s"


def environment_variables(arguments: argparse.Namespace) -> dict[str, str]:
    """Those of this process, with room for torch beside JAX, and what is compiled kept for the next process."""
    defaults = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(tempfile.gettempdir(), "gpu-suite-compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONUNBUFFERED": "1",
    }
    if arguments.rehearse:
        defaults["JAX_PLATFORMS"] = "cpu"
        defaults["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return defaults | os.environ


def stage_deadlines(stages: list[str], now: float, seconds: float) -> Callable[[str, float], float]:
    """What tells a stage, when it begins, until when it may run: its share of all that is left."""
    end = now + seconds

    def deadline(stage: str, begins: float) -> float:
        left = stages[stages.index(stage) :]
        return begins + (end - begins) * SHARES[stage] / sum(SHARES[each] for each in left)

    return deadline


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="all stages together")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(MODULES), help="which, in order")
    parser.add_argument("--quick", action="store_true", help="of the kernels only cases with goals")
    parser.add_argument("--revision", help="of the code, where git can not tell")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, kernels interpreted, on any machine")
    parser.add_argument("--work", choices=MODULES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if unknown := set(arguments.stages) - set(MODULES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(MODULES)}")
    if arguments.work:
        sys.path[0] = str(ROOT)  # this file's folder would hide packages of the same names as its modules
        import jax

        if jax.default_backend() != "gpu" and not arguments.rehearse:
            print("There is no GPU here; --rehearse tries the code on a CPU.", file=sys.stderr)
            return 2
        from bench import timing

        timing.is_rehearsal = arguments.rehearse
        return work(arguments.work, arguments)

    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    deadline = stage_deadlines(arguments.stages, begin, 60 * arguments.minutes)
    status = 0
    for stage in arguments.stages:
        print(f"--- {stage}", flush=True)
        outcome = run_stage(stage, arguments, deadline(stage, time.monotonic()))
        if outcome == "no GPU":
            return 2
        records = read(arguments.out / f"{stage}.jsonl")
        results = [each for each in records if "result" in each]
        failed = [each for each in records if "error" in each or each.get("result", {}).get("passed") is False]
        total = next((len(each["units"]) for each in records if "units" in each), 0)
        print(f"--- {stage}: {outcome}; {len(results)} of {total} have a result, {len(failed)} failed", flush=True)
        status |= not results
    print(f"--- {time.monotonic() - begin:.0f} s, results in {arguments.out}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
