"""What a step of a model is once it is compiled for an NVIDIA GPU, on a machine that has none.

    python -m bench.compiled --model llama-3.1-8b --target h200 [--slots 32] [--context 4096] [--kernels NAME]
                             [--quantize int4] [--kv-dtype fp8]
    python -m bench.compiled --table [--models A,B] [--targets A,B]      Markdown, a line for each
    python -m bench.compiled --check bench/budget.json                   fails where a figure got worse

It compiles a step that decodes one token a slot, and one that also reads prompts, from shapes alone: no weights, no
memory. Nothing here says how fast a step is, but what slows it down shows: more launches, loops outside of CUDA graphs,
bytes moved without need, a cache that is copied, registers that spill. XLA does not tune without a device, so plain
matrix products are its defaults.

JAX's CUDA plugin must be installed; in the environment's folder `cuda`, where `.ci/cuda-compile-only.sh` puts it, it is
found without PYTHONPATH.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsjax
from bench.environment import environment
from bench.shapes import SHAPES
from dsjax.generation import start, step
from dsjax.ragged.schedule import admit
from dsjax.request import request
from pallas_kernels.dispatch import VARIABLE
from pallas_kernels.launches import Schedule, read_schedule, traffic
from pallas_kernels.resources import read_resources
from pallas_kernels.targets import COPIES, TARGETS, Instruction, arrays, available, compile_for, instructions, memory

ROOT = pathlib.Path(__file__).parents[1]
STEPS = ("decode", "mixed")
PAGE_SIZE = 64
COLUMNS = {
    "kernels_per_layer": "kernels a layer",
    "kernels": "kernels",
    "cuda_graphs": "CUDA graphs",
    "outside_graphs": "outside of them",
    "bytes_ratio": "bytes moved / needed",
    "alias_ratio": "aliased / cache",
    "temp_bytes": "temporaries, MB",
    "big_copies": "big copies",
    "spill_bytes": "bytes spilled",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        model: a name in `bench.shapes`.
        target: a name in `pallas_kernels.targets`.
        slots: sequences that run at once.
        context: tokens that each slot has pages for.
        token_budget: tokens of the step that reads prompts.
        layers: of the model, or `None` for all.
        kernels: value of `PALLAS_KERNELS`, which chooses implementations, or `None` for the best of each.
        quantize: scheme of all matrices but the embedding, or `None` for bfloat16.
        kv_dtype: of the pages, or `None` for bfloat16.
    """

    model: str
    target: str
    slots: int = 32
    context: int = 4096
    token_budget: int = 512
    layers: int | None = None
    kernels: str | None = None
    quantize: str | None = None
    kv_dtype: str | None = None


def abstract_step(case: Case, kind: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step over shapes only: the function, and its arguments `(params, queue, state)`."""
    config = SHAPES[case.model]
    config = dataclasses.replace(config, num_layers=case.layers or config.num_layers)
    params = dsjax.abstract(config, jnp.bfloat16)
    queue, capacity = request(
        params,
        np.ones((case.slots, case.context // 2), np.int32),
        max_new_tokens=case.context - case.context // 2,
        slots=case.slots,
        pages=case.slots * case.context // PAGE_SIZE,
        page_size=PAGE_SIZE,
        token_budget=case.token_budget,
        kv_dtype=case.kv_dtype,
    )
    params = jax.eval_shape(lambda params: _prepared(params, case.quantize), params)
    queue = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), queue)
    state = jax.eval_shape(lambda queue: admit(queue, start(params, queue, capacity)), queue)
    size: dict[str, Any] = {"num_tokens": case.slots, "max_q_len": 1}
    if kind == "mixed":
        size = {"num_tokens": case.token_budget}
    return lambda params, queue, state: step(params, queue, state, **size)[0], (params, queue, state)


def _prepared(params: dsjax.Params, scheme: str | None) -> dsjax.Params:
    """As a GPU would have it: matrices in tiles."""
    if scheme is not None:
        params = dsjax.quantize(params, {"embed": None, "*": scheme})
    return dsjax.prepare(params, tiled=True)


def measure(case: Case, kind: str) -> dict[str, Any]:
    """Compiles one step and reads what it is.

    Returns:
        `kernels`: launches, copies included, those in a loop once. `kernels_per_layer`: those of the layers, over their
        number. `cuda_graphs`, and `outside_graphs`: what the host starts one by one. `bytes_ratio`: bytes moved over
        those of the weights and of a full cache, or `None` if a loop does not tell how often it runs. `alias_ratio`:
        bytes updated in place over those of the cache. `temp_bytes`: scratch memory. `big_copies`: copies of a weight,
        or of as much as the pages of a layer. `spill_bytes`: of all Pallas kernels. `fits`: whether one GPU holds it
        all. And what stands behind these.
    """
    fn, (params, queue, state) = abstract_step(case, kind)
    # XLA would change a program that does not fit, to save memory; this is about the program, and says so instead.
    target = dataclasses.replace(TARGETS[case.target], memory=2**50)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_for(fn, params, queue, state, target=target, donate_argnums=2, dump_to=folder)
        seconds = time.perf_counter() - begin
        schedule, resources = read_schedule(folder), read_resources(compiled, folder)

    program, needs = instructions(compiled), memory(compiled)
    scopes = {each.name: each.op_name for each in program}
    pages = [page.size * page.dtype.itemsize for page in jax.tree.leaves(state.pages)]
    launched = traffic(compiled, schedule, parted=pages[0])
    counted = [nbytes for nbytes in launched.values() if nbytes is not None]
    moved = sum(counted) if len(counted) == len(launched) else None
    needed = sum(pages) + needed_weights(params, case.slots if kind == "decode" else case.token_budget)
    return {
        "kernels": len(schedule.launches),
        "kernels_per_layer": round(launches_in_layers(schedule, scopes) / params.config.num_layers, 2),
        "cuda_graphs": schedule.cuda_graphs,
        "outside_graphs": len(schedule.outside_graphs),
        "bytes_ratio": None if moved is None else round(moved / needed, 3),
        "alias_ratio": round(needs.alias / sum(pages), 4),
        "temp_bytes": needs.temporaries,
        "big_copies": len(big_copies(program, params, state.pages)),
        "spill_bytes": sum(each.spill_bytes for each in resources.values()),
        "fits": needs.arguments + needs.temporaries <= TARGETS[case.target].memory,
        "most_kernels": schedule.most_launches,
        "loops": len(schedule.loops),
        "bytes_moved": moved,
        "bytes_needed": needed,
        "compile_seconds": round(seconds, 1),
        "launches": [
            {"instruction": name, "bytes": nbytes, "op_name": scopes.get(name, "")} for name, nbytes in launched.items()
        ],
        "pallas_kernels": {name: vars(each) for name, each in resources.items()},
    }


def needed_weights(params: dsjax.Params, rows: int) -> int:
    """Bytes of the weights that a step can not help reading: of an embedding that is not the head, a row a token."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if "head" not in params:
        return total
    table = params["embed"]["weight"]
    return total - max(table.shape[0] - rows, 0) * table.shape[1] * table.dtype.itemsize


def launches_in_layers(schedule: Schedule, scopes: dict[str, str]) -> int:
    """Launches in the scopes of layers; those of no scope count where the one before them stands."""
    count, inside = 0, False
    for launch in schedule.launches:
        if scope := scopes.get(launch.instruction):
            inside = re.search(r"\blayer_\d+\b", scope) is not None
        count += inside
    return count


def big_copies(program: list[Instruction], params: Any, pages: Any) -> list[Instruction]:
    """What copies a whole weight, or as much as the pages of one layer."""
    by_name = {each.name: each for each in program}
    handed = {}  # to each parameter of a fusion
    for each in program:
        if each.opcode == "fusion":
            body = each.attributes.split("calls=")[1].split(",")[0].lstrip("%")
            handed |= {(body, str(i)): by_name[operand] for i, operand in enumerate(each.operands)}

    def source(each: Instruction) -> Instruction:
        """What it is another view of."""
        while True:
            above = None
            if each.opcode == "parameter":
                above = handed.get((each.computation, each.operands[0]))
            elif each.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
                above = by_name[each.operands[0]]
            if above is None:
                return each
            each = above

    def size(each: Instruction) -> int:
        return max((elements for elements, _ in arrays(each.type)), default=0)

    weights = {leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1}

    def is_big(each: Instruction) -> bool:
        whole = source(by_name[each.operands[0]])
        of_weight = whole.opcode == "parameter" and whole.in_entry and size(whole) in weights
        return size(each) >= pages.keys[0].size or (of_weight and size(each) >= size(whole))

    return [each for each in program if each.opcode in COPIES and is_big(each)]


def in_process(case: Case) -> dict[str, Any]:
    """Measures both steps in a process of its own: one process compiles Mosaic kernels for one kind of GPU only."""
    given = {name: value for name, value in dataclasses.asdict(case).items() if value is not None}
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out.json")
        command = [sys.executable, "-m", "bench.compiled", *arguments, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
        return json.loads(out.read_text())["results"]


def regressions(budget: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What got worse than a budget allows, in words.

    Args:
        budget: for each step the most that each figure may be, of `alias_ratio` the least; `None` allows anything.
        found: for each step what was measured.
    """
    worse = []
    for kind in STEPS:
        for name, limit in budget[kind].items():
            value = found[kind][name]
            if limit is None:
                continue
            if value is None or (value < limit if name == "alias_ratio" else value > limit):
                worse.append(f"{kind}: {name} is {value}, the budget is {limit}")
    return worse


def check(path: pathlib.Path) -> Iterator[tuple[Case, list[str]]]:
    """Compares every case of a budget with what is compiled now."""
    for entry in json.loads(path.read_text())["cases"]:
        case = Case(**entry["case"])
        yield case, regressions(entry, in_process(case))


def shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.1f}" if name == "temp_bytes" else f"{value:g}"


def table(cases: list[Case]) -> Iterator[str]:
    """Lines of a Markdown table, `decode / mixed` in each cell."""
    yield f"| model | target | {' | '.join(COLUMNS.values())} |"
    yield f"| --- | --- |{' ---: |' * len(COLUMNS)}"
    for case in cases:
        found = in_process(case)
        cells = [" / ".join(shown(name, found[kind][name]) for kind in STEPS) for name in COLUMNS]
        fits = all(found[kind]["fits"] for kind in STEPS)
        yield f"| {case.model} | {case.target}{'' if fits else ' (does not fit)'} | {' | '.join(cells)} |"


def print_results(case: Case, results: dict[str, Any]) -> None:
    fits = "" if all(found["fits"] for found in results.values()) else "; weights and cache do not fit on one"
    print(f"{case.model} for {case.target}: {case.slots} slots of {case.context} tokens{fits}")
    print(f"{'':28}" + "".join(f"{kind:>14}" for kind in results))
    more = {"most_kernels": "kernels, longest branches", "compile_seconds": "seconds to compile"}
    for name, title in (COLUMNS | more).items():
        print(f"{title:28}" + "".join(f"{shown(name, found[name]):>14}" for found in results.values()))
    kernels = [(kind, name, each) for kind, found in results.items() for name, each in found["pallas_kernels"].items()]
    for kind, name, each in kernels:
        mix = each["tensor_core_instructions"] if each["sass"] is None else each["sass"]
        cores = ", ".join(f"{count} {instruction}" for instruction, count in mix.items()) or "no tensor cores"
        print(
            f"  {kind}: {name}: {each['registers']} registers, {each['spill_bytes']} bytes spilled, "
            f"{each['shared_memory']} bytes of shared memory, {cores}"
        )
    if any(each["sass"] is None for _, _, each in kernels):
        print("  Instructions are those of the PTX: there is no nvdisasm (pip install nvidia-cuda-nvdisasm).")


def print_launches(results: dict[str, Any]) -> None:
    for kind, found in results.items():
        print(f"{kind}: megabytes, instruction, where it comes from")
        for each in found["launches"]:
            megabytes = "–" if each["bytes"] is None else f"{each['bytes'] / 1e6:.2f}"
            print(f"{megabytes:>12}  {each['instruction']:40} {each['op_name'][-80:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--target", choices=TARGETS, default="h200")
    parser.add_argument("--slots", type=int, default=32, help="sequences that run at once")
    parser.add_argument("--context", type=int, default=4096, help="tokens that each slot has pages for")
    parser.add_argument("--token-budget", type=int, default=512, help="tokens of the step that reads prompts")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to be quick")
    parser.add_argument("--kernels", help=f"{VARIABLE}: implementations, by default the best of each")
    parser.add_argument("--quantize", help="scheme of all matrices but the embedding")
    parser.add_argument("--kv-dtype", help="of the pages: int8, fp8")
    parser.add_argument("--launches", action="store_true", help="list every launch with the bytes that it moves")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--table", action="store_true", help="Markdown of many models and targets")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SHAPES), help="of the table")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS), help="of the table")
    parser.add_argument("--check", type=pathlib.Path, metavar="BUDGET", help="compare with a budget")
    arguments = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")  # else the plugin looks for a driver, and gives up
    sys.path.append(str(pathlib.Path(sys.prefix, "cuda")))
    if reason := available():
        print(f"Nothing can be compiled for a GPU here: {reason}", file=sys.stderr)
        return 2

    if arguments.check:
        status = 0
        for case, worse in check(arguments.check):
            print(f"{case.model} for {case.target}:", "; ".join(worse) or "within its budget", flush=True)
            status |= bool(worse)
        return status
    case = Case(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Case)})
    if arguments.table:
        chosen = [(model, target) for model in arguments.models for target in arguments.targets]
        for line in table([dataclasses.replace(case, model=model, target=target) for model, target in chosen]):
            print(line, flush=True)
        return 0
    if case.kernels is not None:
        os.environ[VARIABLE] = case.kernels
    results = {kind: measure(case, kind) for kind in STEPS}
    print_results(case, results)
    if arguments.launches:
        print_launches(results)
    if arguments.json:
        written = {"environment": environment(("jax", "jaxlib")), "results": results}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
