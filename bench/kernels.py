"""Each kernel on this GPU: how near to what the GPU can do, and beside whatever else computes the same here.

    python -m bench.kernels [--ops ragged_paged_attention,few_row_matmul] [--quick] [--json FILE]
    python -m bench.kernels --rehearse          tiny shapes on a CPU, kernels interpreted: the times mean nothing

For each case: median time of a call, its bytes a second over those of a large copy and its operations a second over
those of a large matrix product, both measured in the same process; and the rivals that are installed, timed in turns
with it. One that can not run is listed with its reason. How a call is timed: `bench.timing`. `--quick` takes the cases
that goals are set on, and is what there is time for on a GPU lent by the minute.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench import experts, quantized, rivals, timing
from bench.problems import Attention, Dense, Matmul, Norm, Rotary, Threshold, decode, described, prefill, ragged
from bench.timing import Contender, ceilings, chained, failure, measure, replace
from pallas_kernels.add_norm import add_norm
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.few_row_matmul import few_row_matmul
from pallas_kernels.few_row_matmul.reference import ACTIVATIONS
from pallas_kernels.few_row_matmul.shapes import MODELS
from pallas_kernels.grouped_matmul.shapes import MODELS as MIXTURES
from pallas_kernels.quantized_matmul.shapes import PRODUCTS
from pallas_kernels.ragged_paged_attention import cascade_attention, ragged_paged_attention, shared_prefixes
from pallas_kernels.rotary_page_write import rotary_page_write
from pallas_kernels.rotary_page_write.shapes import SHAPES
from pallas_kernels.sampling_threshold import sampling_threshold

OWN = "dsjax"  # what names of our contenders begin with


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a contender is to reach.

    Attributes:
        against: `"copy"` or `"matmul"`, the ceilings; `"seconds"`; or a contender.
        value: fraction of the ceiling, most seconds, or how many times faster than the contender.
        of: the contender, or how its name begins: then the fastest of those.
    """

    against: str
    value: float
    of: str = OWN


@dataclasses.dataclass(frozen=True)
class Case:
    """An op on a shape, with what is timed on it.

    Attributes:
        op: name of the op.
        name: of the shape.
        problem: from `bench.problems`.
        contenders: for each name what makes it.
        goals: if any.
    """

    op: str
    name: str
    problem: Any
    contenders: Mapping[str, Callable[[], Contender]]
    goals: tuple[Goal, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}"


def attention(problem: Attention, implementation: str | None = None) -> Contender:
    """Our attention over pages. Decode calls run in a chain, the result being the next queries; others one by one."""
    q, shared, tables = problem.arrays()

    def call(q, shared, table):
        most = 1 if problem.decodes else None
        return ragged_paged_attention(q, page_table=table, **shared, max_q_len=most, implementation=implementation)

    return chained(call, q, shared, tables, follow=replace, calls=None if problem.decodes else 1)


def cascade(problem: Attention) -> Contender:
    """The same with the shared prefix read once; what is shared is found once a step, so not here."""
    q, shared, tables = problem.arrays()
    find = jax.jit(functools.partial(shared_prefixes, page_size=problem.page_size))
    found = [find(table, shared["cu_q_lens"], shared["kv_lens"]) for table in tables]

    def call(q, shared, varying):
        table, prefixes = varying
        return cascade_attention(q, page_table=table, shared=prefixes, **shared, max_q_len=1)

    return chained(call, q, shared, list(zip(tables, found, strict=True)), follow=replace)


def rotary(problem: Rotary, implementation: str) -> Contender:
    pages, rest = problem.arrays()

    def call(pages, rest, _):
        return rotary_page_write(**pages, **rest, implementation=implementation)

    def follow(_, written):
        return {name: getattr(written, name) for name in ("key_pages", "value_pages")}

    contender = chained(call, pages, rest, [None], follow=follow)
    if implementation == "xla":
        contender.notes.append("XLA leaves out the queries, which nothing in the chain reads")
    return contender


def norm(problem: Norm, implementation: str) -> Contender:
    """The sum becomes the next rows and the norm the next update; parts stay, and the norm becomes the next rows."""
    x, update, scale = problem.arrays()
    run = functools.partial(add_norm, eps=1e-5, implementation=implementation)
    if problem.parts:
        rest = (update, scale)
        return chained(lambda x, rest, _: run(x, *rest), x, rest, [None], follow=lambda _, out: out[1])
    return chained(lambda rows, scale, _: run(rows[0], rows[1], scale), (x, update), scale, [None], follow=replace)


def threshold(problem: Threshold, implementation: str) -> Contender:
    settings, logits = problem.arrays()

    def call(settings, logits, _):
        return sampling_threshold(logits, **settings, implementation=implementation)

    return chained(call, settings, logits, [None])


def matmul(problem: Matmul) -> Contender:
    x, weights = problem.arrays()
    *_, activation, partial = problem.product

    def call(x, _, weight):
        return few_row_matmul(x, weight, activation=activation, partial=partial, implementation="triton")

    return chained(call, x, None, weights)


def xla_dot(problem: Matmul) -> Contender:
    """What a model would write, and XLA makes of it what it makes: cuBLAS, or a kernel of its own."""
    x, weights = problem.arrays()
    activation = problem.product.activation

    def call(x, _, weight):
        product = lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
        if activation is None:
            return product
        gate, up = jnp.split(product, 2, axis=-1)
        return ACTIVATIONS[activation](gate) * up

    return chained(call, x, None, weights)


def dense(problem: Dense, implementation: str | None) -> Contender:
    q, k, v = problem.arrays()

    def call(q, pair, _):
        return dense_attention(q, *pair, causal=problem.causal, implementation=implementation)

    return chained(call, q, (k, v), [None], calls=1)


def _partials(make: Callable[..., Contender], problem: Any, **by_name: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{OWN} {name.replace('_', ' ')}": functools.partial(make, problem, **options)
        for name, options in by_name.items()
    }


def _rivals(some: dict[str, Callable[..., Contender]], problem: Any, *without: str) -> dict[str, Any]:
    return {name: functools.partial(make, problem) for name, make in some.items() if name not in without}


def _attention_cases(shrink: Callable[[Any], Any]) -> list[Case]:
    op = "ragged_paged_attention"
    cases = []

    def add(name, problem, goals=(), others=None, without=(), **by_name):
        problem = shrink(problem)
        by_name = by_name or {"triton": {"implementation": "triton"}}
        contenders = _partials(attention, problem, **by_name) | _rivals(others or {}, problem, *without)
        cases.append(Case(op, name, problem, contenders, tuple(goals)))

    every = rivals.DECODE | rivals.PAGED
    for name, problem, goal in (
        ("decode 1 x 1k", decode(1, 1024), Goal("seconds", 10e-6)),
        ("decode 67 MB, 4 x 4k", decode(4, 4096), Goal("copy", 0.58)),
        ("decode 134 MB, 8 x 4k", decode(8, 4096), Goal("copy", 0.74)),
        ("decode 537 MB, 32 x 4k", decode(32, 4096), Goal("copy", 0.90)),
        ("decode 1074 MB, 64 x 4k", decode(64, 4096), Goal("copy", 0.90)),
    ):
        add(name, problem, [goal], every, without=("torch flex",))

    for heads in (64, 32):
        for tokens in (8192, 2048, 32768):
            add(
                f"prefill {tokens // 1024}k, {heads}/8 heads",
                prefill(tokens, heads=heads),
                [Goal("torch cuDNN", 0.90), Goal("torch flash", 1.7)],
                rivals.PREFILL | rivals.PAGED,
                without=() if (heads, tokens) == (32, 8192) else ("torch flex",),  # which takes long to compile
                triton={"implementation": "triton"},
                mosaic={"implementation": "mosaic"},
            )

    sizes = {size: shrink(decode(32, 4096, page_size=size)) for size in (16, 64, 128)}
    pages = {f"{OWN} pages of {size}": functools.partial(attention, each) for size, each in sizes.items()}
    goal = Goal(f"{OWN} pages of 128", 1 / 1.10, of=f"{OWN} pages of 16")
    cases.append(Case(op, "decode 537 MB, page sizes", sizes[64], pages, (goal,)))

    chunk = Attention((512,) * 4, (8704,) * 4)
    layouts = {
        "pages of 64": chunk,
        "pages of 16": dataclasses.replace(chunk, page_size=16),
        "contiguous": dataclasses.replace(chunk, page_size=128, in_order=True),
    }
    contenders = {
        f"{OWN} {backend}, {layout}": functools.partial(attention, shrink(problem), backend)
        for backend in ("triton", "mosaic")
        for layout, problem in layouts.items()
    }
    goals = tuple(
        Goal(f"{OWN} {backend}, contiguous", 0.93, of=f"{OWN} {backend}, pages of 64")
        for backend in ("triton", "mosaic")
    )
    cases.append(Case(op, "4 chunks of 512 after 8k", shrink(chunk), contenders, goals))

    shared = shrink(decode(64, 32768 + 128, shared=32768))
    contenders = {
        f"{OWN} cascade": functools.partial(cascade, shared),
        f"{OWN} plain": functools.partial(attention, shared),
    }
    goal = Goal(f"{OWN} plain", 10.0, of=f"{OWN} cascade")
    cases.append(Case(op, "64 sequences share 32k", shared, contenders, (goal,)))

    add("decode 2 MB, 1 x 512", decode(1, 512))
    add("decode 8 MB, 2 x 1k", decode(2, 1024))
    add("decode 34 MB, 8 x 1k", decode(8, 1024))
    add("decode 67 MB, 1 x 16k", decode(1, 16384))
    add("decode 134 MB, 1 x 32k", decode(1, 32768))
    add("decode 134 MB, 32 x 1k", decode(32, 1024))
    add("decode 537 MB, 32 ragged", Attention((1,) * 32, ragged(32, 131072)))
    add("decode int8, 32 x 4k", decode(32, 4096, stored="int8"))
    add("decode fp8, 32 x 4k", decode(32, 4096, stored="float8_e4m3fn"))
    add("decode 64/8 heads, 32 x 4k", decode(32, 4096, heads=64))
    add("decode 9/3 heads of 64, 32 x 4k", decode(32, 4096, heads=9, kv_heads=3, head_dim=64))
    backends = {"triton": {"implementation": "triton"}, "mosaic": {"implementation": "mosaic"}}
    add("mixed: a chunk of 480 and 31 tokens", Attention((480, *(1,) * 31), (4096,) * 32), **backends)
    add("prefill 8k, heads of 64", prefill(8192, head_dim=64), **backends)
    add("16 prompts of 512", Attention((512,) * 16, (512,) * 16), **backends)
    add("4 chunks of 512 after 8k, int8", dataclasses.replace(chunk, stored="int8"))
    return cases


def _other_cases(shrink: Callable[[Any], Any]) -> list[Case]:
    cases = []

    def add(op, name, problem, make, others=None, goals=(), **by_name):
        problem = shrink(problem)
        contenders = _partials(make, problem, **by_name) | _rivals(others or {}, problem)
        cases.append(Case(op, name, problem, contenders, tuple(goals)))

    both = {name: {"implementation": name} for name in ("triton", "xla")}
    for model, tokens in (("llama-3.1-8b", 32), ("llama-3.1-8b", 1), ("llama-3.1-8b", 512), ("llama-3.1-8b", 8192)):
        add("rotary_page_write", f"{model}, {tokens} tokens", Rotary(SHAPES[model], tokens), rotary, **both)
    for model in ("smollm2-135m", "llama-3.3-70b"):
        add("rotary_page_write", f"{model}, 32 tokens", Rotary(SHAPES[model], 32), rotary, **both)

    torch_norm = {"torch": rivals.torch_norm}
    for shape in ((32, 4096, 4), (32, 4096), (1, 4096), (64, 8192, 4), (32, 576), (8192, 4096)):
        problem = Norm(*shape)
        name = f"{problem.rows} x {problem.width}" + (f", {problem.parts} parts" if problem.parts else "")
        # XLA would add up the parts once for all calls of a chain.
        implementations = {"triton": both["triton"]} if problem.parts else both
        add("add_norm", name, problem, norm, torch_norm, **implementations)

    for name, problem in {
        "top-p": Threshold(32, 128_256, top_p=0.9),
        "top-k": Threshold(32, 128_256, top_k=50),
        "none": Threshold(32, 128_256),
    }.items():
        torch_sort = {"torch sort": rivals.torch_sort} if problem.top_p < 1 else {}
        add("sampling_threshold", f"32 x 128256, {name}", problem, threshold, torch_sort, **both)
    add("sampling_threshold", "32 x 49152, top-p", Threshold(32, 49_152, top_p=0.9), threshold, **both)

    products = [("llama-3.1-8b", name, rows) for rows in (32, 1, 64) for name in MODELS["llama-3.1-8b"]]
    products += [("llama-3.3-70b", name, 32) for name in ("gate_up", "down")]
    products += [("smollm2-135m", name, rows) for rows in (1, 32) for name in ("qkv", "gate_up", "down", "head")]
    others = {"XLA dot": xla_dot, "torch linear": rivals.torch_linear}
    for model, name, rows in products:
        problem = Matmul(MODELS[model][name], rows)
        add("few_row_matmul", f"{model} {name}, {rows} rows", problem, matmul, others, triton={})

    fused = {name: rivals.PREFILL[name] for name in ("torch flash", "torch cuDNN")}
    implementations = {"default": {"implementation": None}, "xla": {"implementation": "xla"}}
    for name, problem in {
        "4 x 2k, causal": Dense(4, 2048),
        "16 x 512 of 12 heads of 64, both ways": Dense(16, 512, 12, 12, 64, causal=False),
    }.items():
        add("dense_attention", name, problem, dense, fused, **implementations)
    return cases


def _expert_cases(shrink: Callable[[Any], Any]) -> list[Case]:
    cases = []
    others = {"XLA ragged_dot": experts.ragged_dot, "torch _grouped_mm": experts.torch_grouped_mm}
    for model in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"):
        for tokens in (1, 32, 64, 2048, 8192):
            for is_int4 in (False, True) if model == "mixtral-8x7b" else (False,):
                problem = shrink(experts.Experts(MIXTURES[model], tokens, is_int4))
                contenders = {f"{OWN} triton": functools.partial(experts.kernels, problem)}
                goals = [Goal("copy", 0.75)]
                if not is_int4:
                    contenders |= _rivals(others, problem)
                    if tokens > 64:
                        goals = [Goal("XLA ragged_dot", 5.0), Goal("torch _grouped_mm", 1.0)]
                name = f"{model}{' int4' if is_int4 else ''}, {tokens} tokens"
                cases.append(Case("grouped_matmul", name, problem, contenders, () if is_int4 else tuple(goals)))
    return cases


def _quantized_cases(shrink: Callable[[Any], Any]) -> list[Case]:
    cases = []

    def add(name, rows, format="int4", *goals):
        problem = shrink(quantized.Quantized(PRODUCTS[name], rows, format))
        contenders = {f"{OWN} triton": functools.partial(quantized.kernel, problem)}
        contenders["XLA dequantized"] = functools.partial(quantized.xla, problem)
        contenders["torch linear, bf16"] = functools.partial(rivals.torch_linear, problem.dense)
        if format == "int4" and problem.product.activation is None:
            contenders["torch int4"] = functools.partial(quantized.torch_int4, problem)
        cases.append(Case("quantized_matmul", f"{format}, {name}, {rows} rows", problem, contenders, goals))

    for rows, ratio in ((1, 3.0), (16, 3.0), (32, 2.7), (64, 2.0)):
        for name in ("llama-3.1-8b qkv", "llama-3.1-8b out", "llama-3.1-8b gate_up", "llama-3.1-8b down"):
            goals = [Goal("torch linear, bf16", ratio)]
            if rows == 1:
                goals.append(Goal("copy", 0.50))
            if "gate_up" not in name:
                goals.append(Goal("torch int4", 1.5))
            add(name, rows, "int4", *goals)
    add("8192 x 16384", 1, "int4", Goal("copy", 0.65), Goal("torch int4", 1.5))
    for format in ("int8", "fp8"):
        add("llama-3.1-8b down", 1, format, Goal("torch linear, bf16", 1.75))
        add("llama-3.1-8b gate_up", 32, format)
    for format in ("q4_0", "fp8 blocks", "fp6", "nf4", "mxfp4", "nvfp4"):
        add("llama-3.1-8b down", 1, format)
        add("llama-3.1-8b down", 32, format)
    for rows in (128, 256, 512):
        add("llama-3.1-8b down", rows)
    add("llama-3.3-70b gate_up", 32)
    return cases


@functools.cache
def cases(tiny: bool = False) -> dict[str, Case]:
    """All cases by title, those with goals first; `tiny` ones for a rehearsal."""
    shrink = (lambda problem: problem.tiny()) if tiny else (lambda problem: problem)
    every = _attention_cases(shrink) + _expert_cases(shrink) + _quantized_cases(shrink) + _other_cases(shrink)
    return {case.title: case for case in sorted(every, key=lambda case: not case.goals)}


def rehearsed() -> list[str]:
    """Titles of a few cases that together take every path: one of each op, and of attention one of each kind."""
    chosen: dict[Any, str] = {}
    for title, case in cases(True).items():
        kinds = [kind for kind in ("decode", "prefill", "share") if kind in case.name]
        if kinds or case.op != "ragged_paged_attention":
            chosen.setdefault((case.op, *kinds), title)
    return list(chosen.values())


def units(quick: bool = False, ops: tuple[str, ...] = (), tiny: bool = False) -> list[str]:
    """Titles of the cases of a run."""
    titles = rehearsed() if tiny else list(cases())
    found = [cases(tiny)[title] for title in titles]
    return [each.title for each in found if (tiny or not quick or each.goals) and (not ops or each.op in ops)]


def run_unit(title: str, tiny: bool = False, rounds: int = 7) -> dict[str, Any]:
    """Times one case.

    Returns:
        Its problem, for each contender the times and what they come to, and the goals.
    """
    case, best = cases(tiny)[title], ceilings(tiny)
    contenders, found = {}, {}
    for name, make in case.contenders.items():
        try:
            contenders[name] = make()
        except Exception as error:  # a rival is never fatal, and neither is a backend of ours that refuses
            found[name] = failure(error)
    found |= measure(contenders, rounds=2 if tiny else rounds, seconds=1e-4 if tiny else 0.01)
    del contenders
    gc.collect()
    for each in found.values():
        if "median" in each:
            each |= achieved(case.problem, each["median"], best)
    result = {"problem": described(case.problem), "contenders": found}
    result["goals"] = [judged(goal, found) for goal in case.goals]
    return result


def achieved(problem: Any, seconds: float, best: dict[str, Any]) -> dict[str, Any]:
    """Bytes and operations a second, and what fraction of the ceilings those are.

    More than a ceiling means that not all was read from memory, or that a contender did less than it was asked.
    """
    found: dict[str, Any] = {"bytes_per_s": problem.bytes / seconds, "copy": problem.bytes / seconds / best["copy"]}
    if hasattr(problem, "flops"):
        found |= {"flop_per_s": problem.flops / seconds, "matmul": problem.flops / seconds / best["matmul"]}
    return found


def judged(goal: Goal, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A goal with the value that was reached, `None` where something did not run."""
    mine = [each for name, each in found.items() if name.startswith(goal.of) and "median" in each]
    fastest = min(mine, key=lambda each: each["median"], default=None)
    other = found.get(goal.against, {})
    value = None
    if fastest is not None and goal.against == "seconds":
        value = fastest["median"]
    elif fastest is not None and goal.against in ("copy", "matmul"):
        value = fastest[goal.against]
    elif fastest is not None and "median" in other:
        value = other["median"] / fastest["median"]
    passed = None
    if value is not None:
        passed = value <= goal.value if goal.against == "seconds" else value >= goal.value
    return dataclasses.asdict(goal) | {"reached": value, "passed": passed}


def lines(title: str, result: dict[str, Any]) -> list[str]:
    """A result in words."""
    shown = [title]
    for name, each in result["contenders"].items():
        if "error" in each:
            shown.append(f"  {name:34} did not run: {each['error'].splitlines()[0][:120]}")
            continue
        spread = f"[{each['low'] * 1e6:.1f}, {each['high'] * 1e6:.1f}]"
        rates = f"{each['bytes_per_s'] / 1e9:8.0f} GB/s ({each['copy']:.2f})"
        if "matmul" in each:
            rates += f"{each['flop_per_s'] / 1e12:8.1f} TFLOP/s ({each['matmul']:.2f})"
        host = "  HOST BOUND" if each["host_bound"] else ""
        shown.append(f"  {name:34}{each['median'] * 1e6:10.1f} us {spread:20}{rates}{host}")
    for goal in result["goals"]:
        reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.3g}"
        shown.append(f"  goal: {goal['of']} / {goal['against']}: {reached} of {goal['value']:.3g}")
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda text: tuple(text.split(",")), default=(), help="only these, by name")
    parser.add_argument("--quick", action="store_true", help="only cases with goals")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.rehearse:
        print("There is no GPU here; --rehearse tries the code on a CPU.", file=sys.stderr)
        return 2
    from bench.environment import environment

    timing.is_rehearsal = tiny = arguments.rehearse
    results: dict[str, Any] = {}
    described_as = {"environment": environment(), "rehearsal": tiny, "ceilings": ceilings(tiny), "results": results}
    for title in units(arguments.quick, arguments.ops, tiny):
        results[title] = run_unit(title, tiny, arguments.rounds)
        print("\n".join(lines(title, results[title])), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(described_as, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too
    sys.exit(main())
