"""The Hopper prefill kernel: simulated with its barriers, and compiled for GPUs that are not there.

Both happen in processes of their own, which run this file as a program. The simulator leaves threads waiting forever
where a kernel is wrong, and a process can compile Mosaic kernels for one capability only.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import answers, assert_exact, make_batch

from pallas_kernels import compat, dispatch, targets
from pallas_kernels.ragged_paged_attention import mosaic, mosaic_prefill, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.blocks import query_blocks
from pallas_kernels.resources import kernel_resources

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = {"window": None, "soft_cap": None, "causal": True}

# (query heads, key heads, head size), q_lens, kv_lens, of the batch, of the call. Slots start at rows of any remainder.
SIMULATED = {
    "groups": ((2, 1, 64), [37, 1, 0, 70, 2], [200, 9, 0, 70, 64], {"page_size": 64, "tokens": 115}, {}),
    "encoder": ((3, 1, 64), [5, 140], [5, 200], {"page_size": 32}, {"window": 30, "causal": False}),
    "multi-query": (
        (16, 1, 128),
        [19, 3],
        [300, 130],
        {"page_size": 128, "dtype": jnp.float16, "features": ("kv_starts",)},
        {"window": 140},
    ),
    "large-heads": (
        (2, 2, 256),
        [1, 33],
        [7, 140],
        {"page_size": 16, "tokens": 37, "features": ("sinks",)},
        {"soft_cap": 20.0, "scale": 0.2},
    ),
    "tiny": ((1, 1, 64), [2], [3], {}, {}),
}
# Query heads, head size, page size, dtype, options; all with two key heads.
COMPILED = {
    "llama": (8, 128, 64, jnp.bfloat16, {}),
    "gpt-oss": (16, 64, 16, jnp.bfloat16, {"window": 128, "sinks": True, "kv_starts": True}),
    "gemma": (4, 256, 128, jnp.bfloat16, {"window": 4096, "soft_cap": 50.0}),
    "encoder": (2, 128, 128, jnp.float16, {"causal": False, "window": 512}),
}
H200 = dispatch.Gpu("NVIDIA H200", (9, 0), 132)


class Simulated:
    """Stands for the Mosaic module: runs kernels in its simulator, with one wait left out if that is asked for."""

    def __init__(self, left_out):
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        self.module, self.left_out, self.waits = compat.mosaic(), left_out, 0
        self.params = InterpretGPUParams(detect_races=True)

    def __getattr__(self, name):
        return getattr(self.module, name)

    def kernel(self, *args, **kwargs):
        return self.module.kernel(*args, interpret=self.params, **kwargs)

    def barrier_wait(self, barrier):
        self.waits += 1
        if self.waits != self.left_out:
            self.module.barrier_wait(barrier)


def simulate(name, left_out=None):
    """Runs a case, with all its barriers or with one wait left out, and compares with float64."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    simulated = Simulated(left_out)
    mosaic_prefill.mosaic = lambda: simulated
    shape, q_lens, kv_lens, of_batch, options = SIMULATED[name]
    batch = make_batch(np.random.default_rng(0), shape, q_lens, kv_lens, **{"dtype": jnp.bfloat16} | of_batch)
    arrays = {"sinks": None, "kv_starts": None} | batch
    static = {"scale": shape[2] ** -0.5} | OPTIONS | options
    out, lse = jax.jit(lambda arrays: mosaic_prefill.prefill(**arrays, **static))(arrays)
    jax.block_until_ready(out)
    assert not interpret_pallas_call.get_races().races_found, "RACE DETECTED"
    expected = answers(batch, **options)
    for row in batch["cu_q_lens"][:-1][np.equal(q_lens, 1)]:  # slots with one query are not this kernel's
        out, lse = out.at[row].set(expected[1][0][row]), lse.at[row].set(expected[1][1][row])
    assert_exact((out, lse), batch, expected)


def replace_what_can_not_be_simulated():
    """No layouts, and products of values where the simulator knows no `wgmma` with an operand in registers."""

    def product(left, right):
        result = jnp.dot(left, right, preferred_element_type=jnp.float32)
        compat.mosaic().commit_smem()  # `wgmma` reads on the side of the copy engine; what stands for it does not
        return result

    def scores(q_tile, k_tile):
        return product(q_tile[...], k_tile[...].T)

    def add(acc, weights, v_tile):
        return acc + product(weights, v_tile[...])

    def scores_and_sum(tiles, summands, started, use, like):
        del like
        result, total = scores(*tiles), add(*summands)
        started()
        return total, *use(result)

    mosaic_prefill._rows = lambda x: x
    mosaic_prefill._iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    mosaic_prefill._scores, mosaic_prefill._sum, mosaic_prefill._scores_and_sum = scores, add, scores_and_sum


def compile_case(name, target):
    """Compiles the kernel; the compiler reports as the environment tells it to."""
    heads, head_dim, page_size, dtype, options = COMPILED[name]

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pages = jax.ShapeDtypeStruct((64, 2, page_size, head_dim), dtype)
    arrays: dict[str, Any] = {"page_table": integers(4, 32), "cu_q_lens": integers(5), "kv_lens": integers(4)}
    arrays |= {"q": jax.ShapeDtypeStruct((1001, heads, head_dim), dtype), "key_pages": pages, "value_pages": pages}
    arrays["sinks"] = jax.ShapeDtypeStruct((heads,), dtype) if "sinks" in options else None
    arrays["kv_starts"] = integers(4) if "kv_starts" in options else None
    static = {"scale": head_dim**-0.5} | OPTIONS | {key: options[key] for key in OPTIONS if key in options}
    targets.compile_for(lambda arrays: mosaic_prefill.prefill(**arrays, **static), arrays, target=target)


def run_this_file(*arguments, timeout, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    command = [sys.executable, __file__, json.dumps(arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def needs_simulator():
    if jax.__version_info__ < (0, 11):
        pytest.skip("the simulator of JAX 0.10 knows no copies that reach past the end of an array, and takes minutes")


@pytest.fixture(scope="module")
def simulation():
    needs_simulator()
    return run_this_file(*(("simulate", name) for name in SIMULATED), timeout=300)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated(simulation, name):
    assert f"simulate {name} passed" in simulation.stdout, simulation.stderr[-3000:]


def test_simulator_finds_a_missing_wait():
    needs_simulator()
    result = run_this_file(("simulate", "tiny", 2), timeout=200)
    assert result.returncode != 0
    assert "RACE DETECTED" in result.stderr


def test_compiled_for_hopper(gpu_compiler):
    """No spills, tensor cores in use, and nothing that makes their instructions wait for each other."""
    dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    result = run_this_file(*(("compile", name, "h100") for name in COMPILED), timeout=300, **dumps)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-3000:]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(COMPILED)
    assert report.count("wgmma.mma_async") >= 16 * len(COMPILED)
    assert "Performance Loss" not in report


def test_runs_on_tensor_cores(gpu_compiler):
    """What the assembler made of it: `HGMMA` are the warpgroup products of Hopper."""
    batch = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 16), (5,), (4,))]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((192, 8, 128), *[(64, 2, 64, 128)] * 2)]
    needs = kernel_resources(lambda *given: ragged_paged_attention(*given), *arrays, *batch, target="h200")
    assert needs["ragged_prefill"].spill_bytes == 0
    assert needs["ragged_prefill"].tensor_core_instructions["wgmma"]
    if needs["ragged_prefill"].sass is None:
        pytest.skip("nvdisasm is not installed (nvidia-cuda-nvdisasm)")
    assert needs["ragged_prefill"].sass["HGMMA"]


def test_refused_before_hopper(gpu_compiler):
    result = run_this_file(("compile", "llama", "a100"), timeout=200)
    assert result.returncode == 1, "it must raise, not abort"
    assert re.search(r"ValueError|NotImplementedError", result.stderr)


def call(head_dim=128, page_size=64, dtype=jnp.bfloat16, stored=None, gpu=H200, **options):
    pages = jax.ShapeDtypeStruct((8, 2, page_size, head_dim), stored or dtype)
    given = {"scale": 0.1, "alibi_slopes": None, "max_q_len": 64} | options
    return mosaic.refusals(jax.ShapeDtypeStruct((64, 4, head_dim), dtype), pages, pages, *[None] * 3, **given, gpu=gpu)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_runs_on_hopper(dtype, head_dim):
    assert call(head_dim, dtype=dtype) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gpu": None}, "no GPU"),
        ({"gpu": dispatch.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)}, "capability 8.0"),
        ({"gpu": dispatch.Gpu("NVIDIA B200", (10, 0), 148)}, "capability 10.0"),
        ({"dtype": jnp.float32}, "float32"),
        ({"stored": jnp.int8}, "int8"),
        ({"head_dim": 80}, "head size 80"),
        ({"page_size": 8}, "page size 8"),
        ({"alibi_slopes": np.ones(4)}, "ALiBi"),
        ({"scale": -1.0}, "not positive"),
        ({"max_q_len": 1}, "decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals(options, reason):
    assert reason in "; ".join(call(**options))


def test_blocks_start_where_tiles_can_be_copied(rng):
    """Every wanted row is in one block, and blocks start at multiples of 8 rows, which the simulator does not check."""
    sizes = mosaic_prefill.tiling(4, 128)
    q_lens = rng.integers(0, 90, 12)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])[:-1]
    reach = np.where(q_lens > 0, q_lens + cu_q_lens % 8, 0)
    slot, start = query_blocks(jnp.asarray(reach), 2 * sizes.tokens, 60)
    row, queries, keys, zero = (jnp.asarray(x) for x in (cu_q_lens, q_lens, q_lens + 5, 0 * q_lens))
    work = mosaic_prefill._work(slot, start, row, queries, keys, zero, sizes, window=None, causal=True)
    work = np.asarray(work)
    work = work[work[:, mosaic_prefill.OWN_END] > 0]
    assert not (work[:, mosaic_prefill.FIRST_ROW] % 8).any()
    spans = work[:, [mosaic_prefill.OWN_BEGIN, mosaic_prefill.OWN_END]]
    assert sorted(row for begin, end in spans for row in range(begin, end)) == list(range(q_lens.sum()))
    assert (spans[:, 1] <= work[:, mosaic_prefill.FIRST_ROW] + 2 * sizes.tokens).all()


if __name__ == "__main__":
    for verb, *case in json.loads(sys.argv[1]):
        if verb == "simulate":
            replace_what_can_not_be_simulated()
            simulate(*case)
        else:
            compile_case(*case)
        print(verb, *case, "passed", flush=True)
