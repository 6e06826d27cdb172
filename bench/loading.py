"""Loading a sharded checkpoint: peak memory against the finished tree, and time against safetensors with device_put.

A random checkpoint of a Llama's shape is written to a temporary folder, in bfloat16 and shards of about 200 MB. Peak
memory is that of a process of its own, which loads a tiny checkpoint first so that JAX has started and imports are
paid. Time is taken in one more process, where contenders take turns; the files are in the page cache; medians count.

    python -m bench.loading --gigabytes 2
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench.environment import environment

HEAD = 64
SHARD = 200e6  # bytes
MEGA = 2**20


def write_checkpoint(folder: pathlib.Path, gigabytes: float, hidden: int = 2048) -> dict[str, int]:
    """A random Llama of about this size; returns the bytes of all tensors and of the largest."""
    folder.mkdir(parents=True)
    ffn, vocab = hidden * 11 // 4, hidden * 8
    layer = 4 * hidden * hidden + 3 * hidden * ffn
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / layer))
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        name = f"model.layers.{i}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}

    draw, shard, places, total, largest = np.random.default_rng(0), {}, {}, 0, 0

    def flush():
        name = f"shard-{len(set(places.values()))}.safetensors"
        places.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name)
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        total, largest = total + shard[name].nbytes, max(largest, shard[name].nbytes)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {"tree": total, "largest": largest, "tensors": len(shapes), "shards": len(set(places.values()))}


def load_ours(folder: pathlib.Path):
    """The parameter tree."""
    import dsjax

    return dsjax.load(folder, dtype="bfloat16")


def load_theirs(folder: pathlib.Path):
    """All shards as safetensors' own reader for JAX gives them, on the device."""
    import jax
    from safetensors.flax import load_file

    return {name: jax.device_put(load_file(path)) for name, path in ((p.name, p) for p in folder.glob("*.safetensors"))}


CONTENDERS = {"dsjax": load_ours, "safetensors": load_theirs}


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure_peak(name: str, tiny: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
    """How much one load adds to this process's largest resident memory, after a load of a tiny checkpoint."""
    import jax

    load = CONTENDERS[name]
    jax.block_until_ready(load(tiny))
    before = peak()
    tree = jax.block_until_ready(load(folder))
    return {"peak": peak() - before, "tree": sum(leaf.nbytes for leaf in jax.tree.leaves(tree))}


def measure_seconds(rounds: int, tiny: pathlib.Path, folder: pathlib.Path) -> dict[str, list[float]]:
    """Seconds of each load, in turns; memory that one gives back the other takes, so neither pays for fresh pages."""
    import jax

    seconds = {name: [] for name in CONTENDERS}
    for load in CONTENDERS.values():
        jax.block_until_ready(load(tiny))
        jax.block_until_ready(load(folder))
    for _ in range(rounds):
        for name, load in CONTENDERS.items():
            begin = time.perf_counter()
            tree = jax.block_until_ready(load(folder))
            seconds[name].append(time.perf_counter() - begin)
            del tree
    return seconds


def child(*arguments: str) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "bench.loading", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each contender (default %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write the result to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *folders = args.child
        paths = [pathlib.Path(folder) for folder in folders]
        print(json.dumps(measure_peak(what, *paths) if what in CONTENDERS else measure_seconds(int(what), *paths)))
        return
    with tempfile.TemporaryDirectory(prefix="dsjax-loading-") as root:
        tiny, folder = pathlib.Path(root, "tiny"), pathlib.Path(root, "large")
        write_checkpoint(tiny, 0, hidden=HEAD)
        sizes = write_checkpoint(folder, args.gigabytes)
        for path in folder.iterdir():  # into the page cache
            path.read_bytes()
        peaks = {name: child(name, str(tiny), str(folder))["peak"] for name in CONTENDERS}
        seconds = child(str(args.rounds), str(tiny), str(folder))
    bound = sizes["tree"] + 2 * sizes["largest"]
    print(
        f"{sizes['tensors']} tensors in {sizes['shards']} shards, {sizes['tree'] / MEGA:,.0f} MiB; the tree and two "
        f"largest tensors: {bound / MEGA:,.0f} MiB"
    )
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"{name:<12}{middle:6.2f} s ({min(each):.2f} to {max(each):.2f}) "
            f"{sizes['tree'] / middle / 1e9:6.2f} GB/s   peak {peaks[name] / MEGA:,.0f} MiB"
        )
    if args.json:
        record = {
            "environment": environment(("jax", "safetensors", "numpy")),
            "sizes": sizes,
            "peaks": peaks,
            "seconds": seconds,
        }
        args.json.write_text(json.dumps(record, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
