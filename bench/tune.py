"""Block sizes of the Triton kernels, tried on this GPU and written to the tables that the dispatcher reads.

    python -m bench.tune [--only few_row_matmul] [--minutes 5] [--tables pallas_kernels/tuning] [--json FILE]
    python -m bench.tune --rehearse                tiny shapes on a CPU, kernels interpreted: nothing is learnt

For each shape the search starts from the rules that the op has for itself and changes one size after another, keeping
what is fastest: a geometric mean where an entry of the table serves several batches. Candidates are timed in turns
(`bench.timing`). One that does not compile drops out, and so does one that spills registers, whatever its time. A
config is written only if it beats the rules by 2 %; entries of other GPUs and shapes stay as they are.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from bench import timing
from bench.dumps import dumped
from bench.experts import Experts, layer
from bench.problems import Attention, Matmul, Rotary, decode, described, prefill
from bench.quantized import Quantized
from bench.timing import Contender, calls_of, chained, failure, measure, replace, touch
from pallas_kernels import dispatch
from pallas_kernels.few_row_matmul import few_row_matmul
from pallas_kernels.few_row_matmul import triton as few_row_triton
from pallas_kernels.few_row_matmul.shapes import MODELS
from pallas_kernels.grouped_matmul import triton as grouped_triton
from pallas_kernels.grouped_matmul.plan import default_block_rows
from pallas_kernels.grouped_matmul.shapes import MODELS as MIXTURES
from pallas_kernels.quantized_matmul import Format, quantized_matmul, tile_width, tiles
from pallas_kernels.quantized_matmul import triton as quantized_triton
from pallas_kernels.quantized_matmul.shapes import FORMATS, PRODUCTS
from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.shapes import MODELS as ATTENTION
from pallas_kernels.resources import read_resources
from pallas_kernels.rotary_page_write import rotary_page_write
from pallas_kernels.rotary_page_write import triton as rotary_triton
from pallas_kernels.rotary_page_write.shapes import SHAPES

LEAST_GAIN = 1.02
MOST_CALLS = 16  # of a program: many candidates are compiled


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry of a table, to be found.

    Attributes:
        op: name of the op, which is the table's.
        name: of the shape.
        problems: what candidates are timed on.
        build: makes the call of a problem: function, carry, constants, what varies, and how a call follows another.
        start: sizes to begin with.
        choices: values to try for each, in the order in which they are tried.
        match: part of the key, where the op looks up more than one entry.
    """

    op: str
    name: str
    problems: tuple[Any, ...]
    build: Callable[[Any], tuple[Any, ...]]
    start: dict[str, int]
    choices: dict[str, tuple[int, ...]]
    match: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}"


@contextlib.contextmanager
def forced(item: Item, config: dict[str, int]) -> Iterator[list[dict[str, Any]]]:
    """Has the op find a config in its table; an empty one is what the table has where it is silent.

    Yields:
        The keys that the op asks for while it is traced.
    """
    asked: list[dict[str, Any]] = []
    original = dispatch.tuned

    def tuned(op: str, gpu: dispatch.Gpu | None, **shape: Any) -> dict[str, Any]:
        if op != item.op or any(shape.get(name) != value for name, value in item.match):
            return original(op, gpu, **shape)
        if shape not in asked:
            asked.append(shape)
        return dict(config)

    with mock.patch.object(dispatch, "tuned", tuned):
        yield asked


def attention_call(problem: Attention) -> tuple[Any, ...]:
    q, shared, tables = problem.arrays()

    def call(q, shared, table):
        most = 1 if problem.decodes else None
        return ragged_paged_attention(q, page_table=table, **shared, max_q_len=most, implementation="triton")

    return call, q, shared, tables, replace


def matmul_call(problem: Matmul) -> tuple[Any, ...]:
    x, weights = problem.arrays()
    *_, activation, partial = problem.product

    def call(x, _, weight):
        return few_row_matmul(x, weight, activation=activation, partial=partial, implementation="triton")

    return call, x, None, weights, touch


def quantized_call(problem: Quantized) -> tuple[Any, ...]:
    x, weights, format = problem.arrays(is_tiled=True)
    *_, activation, partial = problem.product
    run = functools.partial(quantized_matmul, format=format, implementation="triton")

    def call(x, _, weight):
        return run(x, *weight, activation=activation, partial=partial)

    return call, x, None, weights, touch


def experts_call(problem: Experts) -> tuple[Any, ...]:
    return *layer(problem), touch


def rotary_call(problem: Rotary) -> tuple[Any, ...]:
    pages, rest = problem.arrays()

    def call(pages, rest, _):
        return rotary_page_write(**pages, **rest, implementation="triton")

    def follow(_, written):
        return {name: getattr(written, name) for name in ("key_pages", "value_pages")}

    return call, pages, rest, [None], follow


@functools.lru_cache(3)
def _built(build: Callable[[Any], tuple[Any, ...]], problem: Any) -> tuple[Any, ...]:
    return build(problem)


def contender(item: Item, config: dict[str, int], problem: Any) -> tuple[Contender, dict[str, Any]]:
    """A config on a problem: what to time, and the table's key.

    Raises:
        LookupError: the op does not look up exactly one entry.
    """
    call, carry, constants, varying, follow = _built(item.build, problem)
    calls = 1 if isinstance(problem, Attention) and not problem.decodes else min(MOST_CALLS, calls_of(len(varying)))
    with forced(item, config) as asked:
        made = chained(call, carry, constants, varying, calls=calls, follow=follow)
    if len(asked) != 1:
        raise LookupError(f"{item.op} looked up {len(asked)} entries of its table for one shape: {asked}")
    return made, asked[0]


def spilled(item: Item, config: dict[str, int], problem: Any) -> int:
    """Bytes that the kernels of one call spill with a config."""
    call, carry, constants, varying, _ = _built(item.build, problem)
    with forced(item, config):
        # A function of its own: JAX keeps what it traced by function.
        lowered = jax.jit(lambda *arguments: call(*arguments)).lower(carry, constants, varying[0])
    with dumped(lowered) as (compiled, folder):
        return sum(each.spill_bytes for each in read_resources(compiled, folder).values())


def score(found: list[dict[str, Any]]) -> float:
    """Geometric mean of the times on all problems; infinite where one did not run."""
    if any("median" not in each for each in found):
        return math.inf
    return math.exp(sum(math.log(max(each["median"], 1e-9)) for each in found) / len(found))


def search(item: Item, time_all: Callable[[list[dict[str, int]]], list[float]], spills: Callable[[dict], int]):
    """Changes one size after another, keeping what is fastest and does not spill.

    Args:
        item: with its start and choices.
        time_all: seconds of each of several configs, infinite for one that does not run.
        spills: bytes that a config spills.

    Returns:
        The best config and its seconds, those of the rules that the op has for itself, and all that was tried.
    """
    tried: list[dict[str, Any]] = []

    def better(best: dict[str, int], configs: list[dict[str, int]]) -> tuple[dict[str, int], float]:
        times = time_all([best, *configs])
        tried.extend({"config": config, "seconds": each} for config, each in zip([best, *configs], times, strict=True))
        order = sorted(range(1, len(times)), key=times.__getitem__)
        for i in order:
            if times[i] < times[0] and not spills(configs[i - 1]):
                return configs[i - 1], times[i]
        return best, times[0]

    best, seconds = dict(item.start), math.inf
    for field, values in item.choices.items():
        configs = [{**best, field: value} for value in values if value != best[field]]
        best, seconds = better(best, configs)
    rules, seconds = time_all([{}, best])
    return best, seconds, rules, tried


def run_item(item: Item, tiny: bool = False, deadline: float = math.inf) -> dict[str, Any]:
    """Searches one entry.

    Returns:
        The entry, or why there is none; the time of the rules and of the best config; and all that was tried.

    Raises:
        LookupError: the op looked up no entry, or several.
    """
    key: dict[str, Any] = {}
    errors: list[str] = []

    def time_all(configs: list[dict[str, int]]) -> list[float]:
        nonlocal key
        if time.monotonic() > deadline:
            raise TimeoutError("the time for tuning is over")
        times: list[list[dict[str, Any]]] = [[] for _ in configs]
        for problem in item.problems:
            made = {}
            for i, config in enumerate(configs):
                try:
                    made[str(i)], key = contender(item, config, problem)
                except LookupError:
                    raise
                except Exception as error:
                    times[i].append(failure(error))
            found = measure(made, rounds=2 if tiny else 5, seconds=1e-4 if tiny else 5e-3)
            for i, each in found.items():
                times[int(i)].append(each)
        for config, each in zip(configs, times, strict=True):
            errors.extend(f"{config}: {one['error']}" for one in each if "error" in one)
        return [score(each) for each in times]

    def spills(config: dict[str, int]) -> int:
        if tiny:
            return 0
        return max(spilled(item, config, problem) for problem in item.problems)

    best, seconds, rules, tried = search(item, time_all, spills)
    gpu = dispatch.current_gpu()
    gain = rules / seconds
    entry = None
    if gpu is not None and gain >= LEAST_GAIN and not spills(best):
        entry = {"capability": f"{gpu.capability[0]}.{gpu.capability[1]}", "shape": key, "config": best}
    return {
        "op": item.op,
        "problems": [described(problem) for problem in item.problems],
        "entry": entry,
        "shape": key,
        "best": best,
        "seconds": seconds,
        "seconds_of_rules": rules,
        "gain": gain,
        "tried": tried,
        "errors": errors,
    }


def merged(entries: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a table with new ones in place of those for the same GPU and shape, in an order of their own."""

    def key(entry: dict[str, Any]) -> tuple[str, str]:
        return entry["capability"], json.dumps(entry["shape"], sort_keys=True)

    by_key = {key(entry): entry for entry in [*entries, *new]}
    return [by_key[each] for each in sorted(by_key)]


def write_entry(tables: pathlib.Path, op: str, entry: dict[str, Any]) -> None:
    """Puts an entry into a table, one entry a line."""
    path = tables / f"{op}.json"
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    rows = ",\n  ".join(json.dumps(each) for each in merged(entries, [entry]))
    tables.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "entries": [\n  {rows}\n ]\n}}\n')


def _items(shrink: Callable[[Any], Any], tiny: bool) -> Iterator[Item]:
    gpu = dispatch.current_gpu()

    def few_rows(model: str, name: str, rows: int) -> Item:
        problem = shrink(Matmul(MODELS[model][name], rows))
        out, inner, activation, partial = problem.product
        gated = activation is not None
        columns = out // 2 if gated else out
        start = few_row_triton.block_sizes(
            problem.rows, columns, inner, gated=gated, partial=partial, dtype="bfloat16", gpu=gpu
        )
        choices = {
            "splits": (1, 2, 3, 4, 6, 8) if partial else (1,),
            "block_n": (16, 32, 64, 128),
            "block_k": (64, 128, 256),
            "num_stages": (2, 3, 4, 5, 6),
            "num_warps": (2, 4, 8),
        }
        return Item("few_row_matmul", f"{model} {name}, {rows} rows", (problem,), matmul_call, start, choices)

    def quantized(name: str, rows: int, format_name: str = "int4") -> Item:
        problem = shrink(Quantized(PRODUCTS[name], rows, format_name))
        out, inner, activation, partial = problem.product
        format: Format = FORMATS[format_name][0]
        unit = tiles.unit_of(format, tile_width(format, inner) or 16)
        sizes = {"units": inner // unit, "unit": unit, "unit_bytes": unit * format.bits // 8}
        gated = activation is not None
        columns = out // 2 if gated else out
        start = quantized_triton.block_sizes(problem.rows, columns, **sizes, gated=gated, partial=partial, gpu=gpu)
        choices = {
            "splits": (1, 2, 3, 4, 6, 8) if partial else (1,),
            "block_n": (32, 64, 128, 256),
            "num_stages": (2, 3, 4, 5, 6),
            "num_warps": (4, 8),
            "swap": (False, True),
        }
        return Item(
            "quantized_matmul", f"{format_name}, {name}, {rows} rows", (problem,), quantized_call, start, choices
        )

    def experts(model: str, name: str, tokens: int, is_int4: bool = False) -> Item:
        problem = shrink(Experts(MIXTURES[model], tokens, is_int4))
        count, pairs = problem.mixture.count, problem.chosen.size
        index = list(problem.mixture.products()).index(name)
        weight = jax.eval_shape(problem.arrays)[2][0][index]
        gated = name == "gate_up"
        columns = weight.shape[1] // (2 if gated else 1)
        sizes = {"gated": gated, "busy": grouped_triton.expected_busy(pairs, count), "dtype": "bfloat16", "gpu": gpu}
        start = grouped_triton.default_sizes(default_block_rows(pairs, count), columns, weight, **sizes)
        choices = {
            "block_n": (32, 64, 128, 256),
            **({} if is_int4 else {"block_k": (32, 64, 128, 256)}),
            "num_stages": (2, 3, 4, 5, 6),
            "num_warps": (4, 8),
        }
        title = f"{model} {name}, {tokens} tokens{', int4' if is_int4 else ''}"
        match = (("columns", columns), ("gated", gated))
        return Item("grouped_matmul", title, (problem,), experts_call, start, choices, match)

    def attention(kind: str, model: str, page_size: int, stored: str = "bfloat16") -> Item:
        shape = ATTENTION[model]
        options: dict[str, Any] = {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "page_size": page_size,
            "stored": stored,
        }
        if kind == "decode":
            problems = [decode(1, 1024, **options), decode(8, 4096, **options), decode(32, 4096, **options)]
            group = shape.heads // shape.kv_heads
            start = {"keys": 64, "group_rows": max(16, 1 << (group - 1).bit_length())}
            start |= {"num_warps": 4, "num_stages": 3, "programs_per_core": 2}
            choices = {"keys": (32, 64, 128), "programs_per_core": (1, 2, 3, 4), "num_stages": (2, 3, 4, 5)}
        else:
            problems = [prefill(8192, **options), Attention((512,) * 4, (4608,) * 4, **options)]
            start = {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 3}
            choices = {"rows": (64, 128), "keys": (32, 64, 128), "num_stages": (2, 3, 4)}
        problems = tuple(shrink(problem) for problem in problems)
        name = f"{kind}, {model}, pages of {page_size}" + ("" if stored == "bfloat16" else f", {stored}")
        choices["num_warps"] = (4, 8) if kind == "prefill" else (2, 4, 8)
        return Item("ragged_paged_attention", name, problems, attention_call, start, choices, (("kind", kind),))

    def rotary(model: str, tokens: int) -> Item:
        problem = shrink(Rotary(SHAPES[model], tokens))
        heads, kv_heads, head_dim, *_ = problem.shape
        start = rotary_triton.block_sizes(problem.tokens, heads, kv_heads, head_dim, gpu)
        choices = {"rows": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}
        return Item("rotary_page_write", f"{model}, {tokens} tokens", (problem,), rotary_call, start, choices)

    yield attention("decode", "llama-3.1-8b", 64)
    yield few_rows("llama-3.1-8b", "qkv", 32)
    if tiny:
        yield experts("mixtral-8x7b", "down", 3, is_int4=True)
        return
    yield rotary("llama-3.1-8b", 32)
    yield attention("prefill", "llama-3.1-8b", 64)
    yield from (few_rows("llama-3.1-8b", name, 32) for name in ("gate_up", "down", "out", "head"))
    yield from (few_rows("llama-3.1-8b", name, 1) for name in MODELS["llama-3.1-8b"])
    eight = [f"llama-3.1-8b {name}" for name in ("qkv", "out", "gate_up", "down")]
    yield from (quantized(name, rows) for rows in (1, 16, 32, 64) for name in eight)
    yield from (quantized(name, rows, format) for format in ("int8", "fp6") for rows in (1, 32) for name in eight)
    for model, tokens in (("mixtral-8x7b", 32), ("qwen3-30b-a3b", 32), ("mixtral-8x7b", 1)):
        yield from (experts(model, name, tokens, kind) for kind in (False, True) for name in ("gate_up", "down"))
    yield from (experts("gpt-oss-20b", name, 32) for name in ("gate_up", "down"))
    yield attention("decode", "llama-3.3-70b", 64)
    yield attention("decode", "llama-3.1-8b", 64, "int8")
    yield attention("decode", "llama-3.1-8b", 64, "float8_e4m3fn")
    yield attention("decode", "llama-3.1-8b", 16)
    yield attention("decode", "llama-3.1-8b", 128)
    yield attention("decode", "llama-3.2-1b", 64)
    yield attention("decode", "smollm2-135m", 64)
    yield from (few_rows("smollm2-135m", name, rows) for rows in (1, 32) for name in MODELS["smollm2-135m"])
    yield from (few_rows("llama-3.2-1b", name, rows) for rows in (1, 32) for name in MODELS["llama-3.2-1b"])
    yield from (rotary("llama-3.1-8b", tokens) for tokens in (1, 64, 512, 8192))
    yield attention("prefill", "llama-3.3-70b", 64)
    yield attention("prefill", "llama-3.2-1b", 64)
    yield from (few_rows("llama-3.1-8b", name, 64) for name in MODELS["llama-3.1-8b"])
    yield from (few_rows("llama-3.3-70b", name, 32) for name in MODELS["llama-3.3-70b"])


@functools.cache
def items(tiny: bool = False) -> dict[str, Item]:
    """All items by title, those that matter most first."""
    shrink = (lambda problem: problem.tiny()) if tiny else (lambda problem: problem)
    found = {item.title: item for item in _items(shrink, tiny)}
    if not tiny:
        return found
    # One size and two values of it: interpreted kernels take long to compile.
    first = {title: next(iter(item.choices.items())) for title, item in found.items()}
    return {
        title: dataclasses.replace(item, choices={first[title][0]: first[title][1][:2]}, problems=item.problems[:1])
        for title, item in found.items()
    }


def lines(title: str, result: dict[str, Any]) -> list[str]:
    """A result in words."""
    times = f"{result['seconds_of_rules'] * 1e6:.1f} us by the rules, {result['seconds'] * 1e6:.1f} us with"
    verdict = "written" if result["entry"] else "not written"
    return [f"{title}: {times} {result['best']} ({verdict}; {len(result['tried'])} tried)"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="titles that hold this")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop when they are over")
    parser.add_argument("--tables", type=pathlib.Path, default=dispatch.TABLES, help="folder of the tables")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any machine; writes no table")
    parser.add_argument("--json", type=pathlib.Path, help="write all that was tried here")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.rehearse:
        print("There is no GPU here: block sizes can only be tuned on the GPU they are for.", file=sys.stderr)
        return 2
    from bench.environment import environment

    timing.is_rehearsal = arguments.rehearse
    deadline, results = time.monotonic() + 60 * arguments.minutes, {}
    for title, item in items(arguments.rehearse).items():
        if arguments.only not in title:
            continue
        try:
            results[title] = run_item(item, arguments.rehearse, deadline)
        except TimeoutError as error:
            print(error)
            break
        print("\n".join(lines(title, results[title])), flush=True)
        if entry := results[title]["entry"]:
            write_entry(arguments.tables, item.op, entry)
        if arguments.json:
            text = json.dumps({"environment": environment(), "rehearsal": arguments.rehearse, "results": results})
            arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
