"""Dynamic SplitFuse on and off, at equal load: gaps between tokens, and requests that were served well.

    python -m bench.splitfuse --json bench/results/splitfuse.json
    python -m bench.splitfuse --plot bench/results/splitfuse.json

The workload is DeepSpeed-FastGen's (arXiv 2401.08671), scaled to a CPU: prompts and outputs of normally distributed
lengths, arrivals as a Poisson process, at several shares of what the machine can serve. With SplitFuse a step holds a
piece of a prompt beside the decoding sequences; without, whole prompts are read alone while those wait. Both engines
get the same requests at the same times. A request is served well if its first token came within `prompt / rate`
seconds and the moving average of its speed never fell below a floor; rate and floors are set from what the machine does
for one request alone, since FastGen's (512 tokens/s; 2, 4, 6 tokens/s) are for GPUs.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from typing import Any

import numpy as np

import dsjax
from bench.environment import environment
from bench.prefix import model

CONTEXT = 512
LOADS = (0.4, 0.6, 0.8)  # of the capacity
FLOORS = (1 / 16, 1 / 8, 1 / 4)  # of the speed of one request alone
PATIENCE = 4  # a prompt may take so many times as long as alone
SMOOTHING = 0.5  # of the moving average
PERCENTILES = (50, 90, 95, 99)
ENGINES: dict[str, dict[str, Any]] = {
    "splitfuse": {"split_fuse": True, "token_budget": 64},
    "whole prompts": {"split_fuse": False, "token_budget": CONTEXT},
}


def workload(args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each gets."""
    draw = np.random.default_rng(0)

    def lengths(mean: int) -> np.ndarray:
        return np.clip(draw.normal(mean, 0.3 * mean, args.requests).astype(int), 2, CONTEXT - 100)

    return [
        (draw.integers(0, 49_152, prompt).tolist(), int(min(new, CONTEXT - prompt)))
        for prompt, new in zip(lengths(args.prompt), lengths(args.new), strict=True)
    ]


def settings(new: int) -> dsjax.SamplingParams:
    return dsjax.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def serve(engine: dsjax.Engine, requests: list[tuple[list[int], int]], arrivals: np.ndarray) -> list[list[float]]:
    """When each request arrived and when each of its tokens came, in seconds."""
    begin = time.perf_counter()
    times: list[list[float]] = [[float(arrival)] for arrival in arrivals]
    place: dict[str, int] = {}
    sent = 0
    while sent < len(requests) or place:
        now = time.perf_counter() - begin
        while sent < len(requests) and arrivals[sent] <= now:
            prompt, new = requests[sent]
            place[engine.add_request(prompt, settings(new))] = sent
            sent += 1
        if not place:
            time.sleep(max(0.0, arrivals[sent] - now))
            continue
        outputs = engine.step(partial=True)
        now = time.perf_counter() - begin
        for output in outputs:
            known = times[place[output.request_id]]
            known += [now] * (len(output.outputs[0].token_ids) + 1 - len(known))
            if output.finished:
                del place[output.request_id]
    return times


def alone(engine: dsjax.Engine, prompt: int) -> tuple[float, float]:
    """Prompt tokens and generated tokens a second of one request at a time."""
    runs = [serve(engine, [(list(range(prompt)), 33)], np.zeros(1))[0] for _ in range(4)][1:]
    read = statistics.median(prompt / (one[1] - one[0]) for one in runs)
    return read, statistics.median(32 / (one[-1] - one[1]) for one in runs)


def figures(requests, times: list[list[float]], read: float, speed: float) -> dict[str, Any]:
    """What a run of requests amounts to."""
    gaps = np.concatenate([np.diff(one[1:]) for one in times])
    first = np.array([one[1] - one[0] for one in times])
    patience = np.array([len(prompt) for prompt, _ in requests]) * PATIENCE / read
    slowest = []
    for one in times:
        average, lowest = None, np.inf
        for gap in np.diff(one[1:]):
            rate = 1 / max(gap, 1e-6)
            average = rate if average is None else SMOOTHING * rate + (1 - SMOOTHING) * average
            lowest = min(lowest, average)
        slowest.append(lowest)
    seconds = max(one[-1] for one in times)
    return {
        "gaps_ms": {str(p): 1e3 * float(np.percentile(gaps, p)) for p in PERCENTILES},
        "first_ms": {str(p): 1e3 * float(np.percentile(first, p)) for p in PERCENTILES},
        "throughput": len(times) / seconds,
        "effective": [
            float(((first <= patience) & (np.array(slowest) >= floor * speed)).sum() / seconds) for floor in FLOORS
        ],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each load with each engine, in turns."""
    params = model(args.layers)
    common = {"slots": 8, "max_context": CONTEXT, "pages": 8 * CONTEXT // 64, "prefix_caching": False}
    engines = {name: dsjax.Engine(params, **common, **options) for name, options in ENGINES.items()}
    requests = workload(args)
    rates = [alone(engine, args.prompt) for engine in engines.values()]
    read, speed = max(rate[0] for rate in rates), max(rate[1] for rate in rates)
    capacity = 0.0
    for engine in engines.values():
        times = serve(engine, requests, np.zeros(len(requests)))
        capacity = max(capacity, len(requests) / max(one[-1] for one in times))
    print(f"alone: {read:.0f} prompt tokens/s, {speed:.0f} tokens/s; capacity {capacity:.2f} requests/s")
    runs = []
    for load in LOADS:
        gaps = np.random.default_rng(1).exponential(1 / (load * capacity), len(requests))
        for repeat in range(args.repeats):
            for name, engine in engines.items():
                times = serve(engine, requests, np.cumsum(gaps) - gaps[0])
                run = {"engine": name, "load": load, "repeat": repeat, **figures(requests, times, read, speed)}
                runs.append(run)
                tail = ", ".join(f"P{p} {run['gaps_ms'][str(p)]:.0f}" for p in PERCENTILES)
                well = ", ".join(f"{rate:.2f}" for rate in run["effective"])
                print(
                    f"load {load:.0%} {name:<14} gaps {tail} ms; first token P50 {run['first_ms']['50']:.0f} ms; "
                    f"{run['throughput']:.2f} requests/s, well served {well}"
                )
    return {"read": read, "speed": speed, "capacity": capacity, "runs": runs}


def plot(path: pathlib.Path) -> pathlib.Path:
    """Draw the tail of the gaps, and requests that were served well, by load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads(path.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, color in zip(ENGINES, ("C0", "C1"), strict=True):
        for percentile, style in (("50", ":"), ("95", "--"), ("99", "-")):
            values = [_middle(record, name, load, lambda run, p=percentile: run["gaps_ms"][p]) for load in LOADS]
            left.plot(
                [100 * load for load in LOADS], values, style, color=color, marker="o", label=f"{name}, P{percentile}"
            )
        for index, style in ((0, ":"), (2, "-")):
            values = [_middle(record, name, load, lambda run, i=index: run["effective"][i]) for load in LOADS]
            floor = FLOORS[index] * record["speed"]
            right.plot(
                [100 * load for load in LOADS],
                values,
                style,
                color=color,
                marker="o",
                label=f"{name}, {floor:.0f} tokens/s",
            )
    left.set(xlabel="load, % of capacity", ylabel="gap between tokens, ms", yscale="log")
    right.set(xlabel="load, % of capacity", ylabel="requests/s served well", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target


def _middle(record: dict[str, Any], name: str, load: float, of: Any) -> float:
    return statistics.median(of(run) for run in record["runs"] if (run["engine"], run["load"]) == (name, load))


def main() -> None:
    """Measures and prints, or plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=6, help="of the model (default %(default)s)")
    add("--requests", type=int, default=64, help="in a run (default %(default)s)")
    add("--prompt", type=int, default=260, help="mean tokens of a prompt (default %(default)s)")
    add("--new", type=int, default=32, help="mean tokens generated (default %(default)s)")
    add("--repeats", type=int, default=2, help="of each run (default %(default)s)")
    add("--json", type=pathlib.Path, help="write the result to this file")
    add("--plot", type=pathlib.Path, help="draw such a file, and measure nothing")
    args = parser.parse_args()
    if args.plot:
        print(plot(args.plot))
        return
    record = {"environment": environment(("jax", "numpy")), **measure(args)}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
