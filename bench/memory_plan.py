"""How an engine divides the memory of a GPU that is not there, and its plan against the bytes that a CPU really uses.

    python -m bench.memory_plan [--models A,B] [--targets A,B] [--json FILE]     plans, a line of Markdown for each
    python -m bench.memory_plan --measure                                        predicted and measured on this CPU

Plans are made by what makes an engine's own, from shapes and compiled programs. Only what temporaries need is compiled,
with few layers: they are the same with more, since a program needs one layer's at a time. JAX's CUDA plugin must be
installed, as for `bench.compiled`; several GPUs of a kind are a mesh of as many that are not there.

`--measure` starts a process of its own that serves a load once, drops everything, notes its resident memory, serves
again with new parameters and a new engine, and reads the most that was resident meanwhile. So programs, Python and JAX
are there before and do not count.
"""

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import dsjax
from bench.environment import environment
from bench.shapes import SHAPES
from dsjax import workspace
from dsjax.engine.compiled import Programs
from dsjax.engine.programs import Sizes
from dsjax.engine.setup import choose_sizes
from dsjax.memory import readable
from dsjax.params import Params, flatten, leaf_sharding, logical_axes, unflatten
from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.sharding import named_sharding
from pallas_kernels.targets import TARGETS, available, compile_for, sharding, topology

ROOT = pathlib.Path(__file__).parents[1]
MODELS = ("llama-3.1-8b", "llama-3.3-70b")
GPUS = ("a100", "h200")
FORMATS = ("bfloat16", "q8_0", "q4_0")
DEVICES = (1, 2, 4, 8)
LAYERS = 2  # that are compiled
SIZES: dict[str, Any] = {
    "slots": 256,
    "token_budget": 512,
    "page_size": 64,
    "max_context": 8192,
    "steps_per_sync": None,
    "kv_dtype": None,
    "prefix_caching": True,
    "split_fuse": True,
    "max_logprobs": 20,
    "implementation": None,
}
COLUMNS = ("weights", "state", "temporaries", "page")


class AbsentPrograms(Programs):
    """Programs for GPUs that are not there.

    Args:
        shapes: parameters with the shardings of such GPUs.
        sizes: of the engine.
        target: name of the GPU.
        layers: how many to compile, `None` for all.
    """

    def __init__(self, shapes: Params, sizes: Sizes, target: str, layers: int | None):
        super().__init__(shapes, sizes)
        # XLA would change a program that does not fit, to save memory; the plan says what it would need.
        self.target = dataclasses.replace(TARGETS[target], memory=2**50)
        self.shorter = None if layers is None else AbsentPrograms(with_layers(shapes, layers), sizes, target, None)
        self.seconds = 0.0

    def build(self, function: Any, arguments: tuple) -> Any:
        return compile_for(function, *arguments, target=self.target)

    def warm_up(self, bar: Any = None, names: tuple[str, ...] | None = None) -> None:
        begin = time.perf_counter()
        if self.shorter is None:
            # The step that reads prompts, with every feature, needs the most: as many rows of logits, and more tokens.
            super().warm_up(bar, names or ("read",))
        else:
            self.shorter.warm_up(bar, names)
        self.seconds += time.perf_counter() - begin

    def temporaries(self) -> int:
        return super().temporaries() if self.shorter is None else self.shorter.temporaries()


def with_layers(params: Params, count: int) -> Params:
    """The same tree with the first layers alone."""
    config = dataclasses.replace(params.config, num_layers=count)
    kept = {}
    for path, leaf in flatten(params).items():
        name, *rest = path.split(".")
        if name != "layers" or int(rest[0]) < count:
            kept[path] = leaf
    return unflatten(kept, config)


def shapes(model: str, stored: str, target: str, devices: int) -> Params:
    """A model's parameters as shapes on GPUs that are not there.

    Args:
        model: a name in `bench.shapes`.
        stored: `"bfloat16"`, or a scheme that matrices are quantized to.
        target: name of the GPU.
        devices: how many of them.
    """
    params = jax.eval_shape(dsjax.prepare, dsjax.abstract(SHAPES[model], jnp.bfloat16))
    one = sharding(TARGETS[target])
    mesh = Mesh(np.array(topology(TARGETS[target], f"1x1x{devices}").devices), ("tensor",))
    axes = logical_axes(params)

    def place(path: str, shape: tuple[int, ...], dtype: Any) -> Any:
        where = one if devices == 1 else named_sharding(mesh, axes[path], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    leaves: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if stored not in SCHEMES or leaf.ndim < 2:
            leaves[path] = place(path, leaf.shape, leaf.dtype)
            continue
        scheme = SCHEMES[stored]
        whole = QuantizedArray(**{"minimums": None, **scheme.parts(leaf.shape)}, scheme=scheme, dtype=leaf.dtype)
        where = leaf_sharding(whole, axes[path], mesh) if devices > 1 else jax.tree.map(lambda _: one, whole)
        leaves[path] = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), whole, where)
    return unflatten(leaves, params.config)


def planned(model: str, stored: str, target: str, devices: int, layers: int | None = LAYERS) -> dict[str, Any]:
    """The plan of an engine, or the message that its caller gets."""
    params = shapes(model, stored, target, devices)
    sizes = choose_sizes(params, None, **SIZES)
    gpu = TARGETS[target]
    made: list[AbsentPrograms] = []

    def programs_of(params: Params, sizes: Sizes) -> Programs:
        made.append(AbsentPrograms(params, sizes, target, layers))
        return made[-1]

    found: dict[str, Any] = {"model": model, "stored": stored, "device_kind": gpu.device_kind, "devices": devices}
    try:
        plan, _ = workspace.plan(params, sizes, None, None, False, total=gpu.memory, programs_of=programs_of)
    except dsjax.EngineError as error:
        return found | {"fits": False, "message": str(error)}
    figures = {name: getattr(plan, name) for name in (*COLUMNS, "memory", "budget", "pages", "tokens", "total")}
    seconds = round(sum(each.seconds for each in made), 1)
    times = {"compiled": len(made), "compile_seconds": seconds, "layers_compiled": layers}
    return found | {"fits": True, "message": plan.summary(), **figures, **times}


def in_process(*arguments: str) -> Any:
    """What a process of its own prints: one process compiles Mosaic kernels for one kind of GPU only."""
    command = [sys.executable, "-m", "bench.memory_plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def note(path: pathlib.Path | None, results: dict[str, Any]) -> None:
    """Write results to a file, beside those of other runs that it holds."""
    if path is not None:
        written = json.loads(path.read_text()) if path.exists() else {}
        about = environment(("jax", "jaxlib"))
        written |= {name: {"environment": about, **found} for name, found in results.items()}
        path.write_text(json.dumps(written, indent=1) + "\n")


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    gpus = f"{found['devices']} × {found['device_kind'].removeprefix('NVIDIA ')}"
    begin = f"| {found['model']} | {found['stored']} | {gpus} "
    if not found["fits"]:
        return begin + "| | | | | does not fit | |"
    sizes = " | ".join(readable(found[name]) for name in COLUMNS)
    return begin + f"| {sizes} | {found['pages']:,} | {found['tokens']:,} |"


# Predicted and measured on a CPU.


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: `VmRSS` is what is resident now, `VmHWM` the most since it was cleared."""
    for text in pathlib.Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def trim() -> None:
    """Give back what the C library keeps of memory that was freed."""
    ctypes.CDLL(None).malloc_trim(0)


def measured() -> dict[str, Any]:
    """An engine's plan, and by how much resident memory rose at most from before its parameters were made."""
    config = dsjax.ModelConfig(
        model_type="llama",
        vocab_size=16_384,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=2,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_context=512,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, 40).tolist() for _ in range(24)]
    settings = dsjax.SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9, repetition_penalty=1.1, ignore_eos=True)
    draw = jax.jit(lambda key: dsjax.prepare(dsjax.init(config, key)))

    def serve() -> tuple[dsjax.Engine, int]:
        """An engine that has answered, and the bytes of all arrays before it did."""
        params = jax.block_until_ready(draw(jax.random.key(0)))
        engine = dsjax.Engine(params, slots=64, token_budget=1024, max_context=512, pages=320)
        arrays = sum(x.nbytes for x in jax.live_arrays())
        trim()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
        engine.generate(prompts, settings, progress=False)
        return engine, arrays

    serve()  # after that the process has compiled, and imported and touched all of the code that runs
    gc.collect()
    trim()
    left, before = sum(x.nbytes for x in jax.live_arrays()), resident("VmRSS")
    engine, arrays = serve()
    peak = resident("VmHWM") - before
    plan = engine.plan
    engine.release()
    return {
        "predicted": plan.total,
        "measured": peak,
        "ratio": round(peak / plan.total, 4),
        "weights": plan.weights,
        "state": plan.state,
        "temporaries": plan.temporaries,
        "pages": plan.pages * plan.page,
        "arrays": arrays - left,
        "after_release": resident("VmRSS") - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(GPUS))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS), help="of the weights")
    parser.add_argument("--devices", type=lambda text: [int(part) for part in text.split(",")], default=list(DEVICES))
    parser.add_argument("--measure", action="store_true", help="predicted and measured bytes on this CPU")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")  # else the plugin looks for a driver, and gives up
    if arguments.child == ["measure"]:
        print(json.dumps(measured()))
        return 0
    if arguments.measure:
        found = in_process("--child", "measure")
        for name, value in found.items():
            print(f"{name:16}{value if name == 'ratio' else readable(value)}")
        note(arguments.json, {"cpu": found})
    else:
        sys.path.append(str(pathlib.Path(sys.prefix, "cuda")))
        if reason := available():
            print(f"Nothing can be compiled for a GPU here: {reason}", file=sys.stderr)
            return 2
        if arguments.child:
            model, stored, target, devices, layers = arguments.child
            print(json.dumps(planned(model, stored, target, int(devices), int(layers) or None)))
            return 0
        print(f"| model | weights are | GPUs | {' | '.join(COLUMNS)} | pages | tokens |")
        print(f"| --- | --- | --- |{' ---: |' * (len(COLUMNS) + 2)}")
        for model, stored, target in itertools.product(arguments.models, arguments.formats, arguments.targets):
            for devices in arguments.devices:
                found = in_process("--child", model, stored, target, str(devices), str(LAYERS))
                print(line(found), flush=True)
                note(arguments.json, {f"{model}, {stored}, {devices} x {target}": found})
                if found["fits"] and devices == 1:
                    break
    return 0


if __name__ == "__main__":
    sys.exit(main())
