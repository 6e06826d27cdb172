"""The arithmetic of the GPU benchmarks, which no GPU is needed for, and a rehearsal of one of them."""

import collections
import json
import math
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu_suite, kernels, numerics, problems, timing, tune
from pallas_kernels import dispatch
from pallas_kernels.add_norm import add_norm
from pallas_kernels.few_row_matmul import few_row_matmul
from pallas_kernels.few_row_matmul.shapes import Product
from pallas_kernels.launches import read_schedule
from pallas_kernels.targets import compile_for


class FakeGpu:
    """A clock, a queue, and programs that take their time in it."""

    def __init__(self):
        self.now, self.busy_until, self.started = 0.0, 0.0, []

    def clock(self):
        return self.now

    def contender(self, name, seconds, calls=10, start=3e-6, gap=0.0, **options):
        def run():
            self.now += start
            self.busy_until = max(self.now, self.busy_until) + gap + seconds * calls
            self.started.append(name)

        def wait(_):
            self.now = max(self.now, self.busy_until) + 40e-6  # what it costs to notice

        return timing.Contender(run, wait, calls, **options)


def test_seconds_a_call_are_the_slope_and_nothing_of_the_host():
    gpu = FakeGpu()
    contenders = {"a": gpu.contender("a", 5e-6), "b": gpu.contender("b", 2e-6, gap=1e-6)}
    found = timing.measure(contenders, rounds=3, clock=gpu.clock)
    assert found["a"]["median"] == pytest.approx(5e-6)
    assert found["b"]["median"] == pytest.approx(2.1e-6)  # the start of a program belongs to its calls
    assert found["a"]["low"] <= found["a"]["median"] <= found["a"]["high"]
    assert not found["a"]["host_bound"]


def test_contenders_take_turns():
    gpu = FakeGpu()
    timing.measure({name: gpu.contender(name, 1e-3, calls=1) for name in "ab"}, rounds=2, clock=gpu.clock)
    turns = [name for i, name in enumerate(gpu.started) if not i or gpu.started[i - 1] != name]
    assert "".join(turns[-4:]) == "abab"


def test_a_slow_host_is_noticed():
    gpu = FakeGpu()
    found = timing.measure({"a": gpu.contender("a", 1e-6, start=1e-3)}, rounds=3, clock=gpu.clock)
    assert found["a"]["host_bound"]


def test_one_that_fails_drops_out():
    gpu = FakeGpu()
    broken = timing.Contender(lambda: 1 / 0, lambda _: None, 1)
    found = timing.measure({"broken": broken, "a": gpu.contender("a", 1e-6)}, rounds=1, clock=gpu.clock)
    assert found["broken"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["a"]["median"] == pytest.approx(1e-6)


def test_state_is_put_back_before_every_sample():
    gpu, puts = FakeGpu(), []
    contender = gpu.contender("a", 1e-3, calls=1, before=lambda: puts.append(len(gpu.started)), most=6)
    timing.measure({"a": contender}, rounds=2, clock=gpu.clock)
    assert max(np.diff([*puts, len(gpu.started)])) <= 6


@pytest.mark.parametrize("nbytes", [10, 2 * 2**20, 67 * 2**20, 2**30])
def test_calls_rotate_over_more_than_the_cache_holds(nbytes):
    count = timing.rotations(nbytes)
    assert count * nbytes > 2 * timing.L2_BYTES or count == timing.MOST_CALLS
    assert timing.calls_of(count) >= timing.FEWEST_CALLS
    assert timing.calls_of(count) % count == 0


def test_counts_of_attention():
    decode = problems.decode(32, 4096)
    assert decode.kv_bytes == 2 * 32 * 4096 * 8 * 128 * 2  # 537 MB, as the case is called
    assert decode.bytes == decode.kv_bytes + 2 * 2 * 32 * 32 * 128
    prompt = problems.prefill(2048, heads=64)
    assert prompt.flops == 4 * 64 * 128 * 2048 * 2049 // 2
    chunk = problems.Attention((3, 1), (5, 7), heads=2, kv_heads=1, head_dim=16)
    assert chunk.flops == 4 * 2 * 16 * (3 + 4 + 5 + 7)
    assert problems.decode(1, 1, stored="int8").kv_bytes == 2 * 8 * (128 + 4)
    assert sum(problems.ragged(32, 131072)) == pytest.approx(131072, rel=1e-3)


def test_counts_of_the_others():
    assert problems.Norm(32, 4096).bytes == 32 * 4096 * 2 * 4
    assert problems.Norm(32, 4096, 4).bytes == 32 * 4096 * (2 + 16 + 2 + 2)
    product = problems.Matmul(Product(2 * 14336, 4096, "silu", partial=False), 32)
    assert product.bytes == 2 * (2 * 14336 * 4096 + 32 * (4096 + 14336))
    assert product.flops == 2 * 32 * 2 * 14336 * 4096
    assert problems.Dense(2, 4, heads=1, kv_heads=1, head_dim=8).flops == 4 * 2 * 8 * 10


def test_page_tables_share_what_is_common_and_nothing_else(monkeypatch):
    monkeypatch.setattr(timing, "is_rehearsal", True)  # two tables
    problem = problems.decode(3, 40, shared=16, heads=2, kv_heads=1, head_dim=16, page_size=16)
    q, pools, tables = problem.arrays()
    pages = [np.asarray(table) for table in tables]
    assert q.shape == (3, 2, 16) and len(pages) == 2
    for table in pages:
        assert len(set(table[:, 0])) == 1 and len(set(table[:, 1:].ravel())) == 6
    everything = np.concatenate([np.unique(table) for table in pages])
    assert len(everything) == len(set(everything)) == pools["key_pages"].shape[0]


def test_every_case_is_named_once_and_counts():
    every = kernels.cases()
    assert {case.op for case in every.values()} >= {"ragged_paged_attention", "rotary_page_write", "few_row_matmul"}
    for case in every.values():
        assert case.problem.bytes > 0
        assert any(name.startswith(kernels.OWN) for name in case.contenders)
        json.dumps(problems.described(case.problem))
        for goal in case.goals:
            assert goal.against in ("copy", "matmul", "seconds", *case.contenders)
    assert set(kernels.units(quick=True)) == {title for title, case in every.items() if case.goals}


def test_goals_are_judged_by_the_fastest_of_ours():
    found = {
        "dsjax triton": {"median": 4e-6, "copy": 0.5},
        "dsjax mosaic": {"median": 2e-6, "copy": 0.8},
        "torch": {"median": 3e-6, "copy": 0.6},
        "broken": {"error": "no"},
    }
    reached = {
        kernels.Goal("copy", 0.9): (0.8, False),
        kernels.Goal("torch", 1.5): (1.5, True),
        kernels.Goal("torch", 0.9, of="dsjax triton"): (0.75, False),
        kernels.Goal("seconds", 3e-6): (2e-6, True),
        kernels.Goal("broken", 1.0): (None, None),
    }
    for goal, (value, passed) in reached.items():
        judged = kernels.judged(goal, found)
        assert judged["reached"] == (None if value is None else pytest.approx(value)) and judged["passed"] is passed


def test_a_kernel_is_rehearsed(monkeypatch):
    monkeypatch.setattr(timing, "is_rehearsal", True)
    title = "few_row_matmul: llama-3.1-8b qkv, 32 rows"
    result = kernels.run_unit(title, tiny=True)
    assert result["contenders"]["dsjax triton"]["calls"] == 2
    assert {"median", "bytes_per_s", "copy", "flop_per_s"} <= result["contenders"]["XLA dot"].keys()
    json.dumps(result)
    assert kernels.lines(title, result)[0] == title


def test_each_call_of_a_chain_is_a_launch_of_its_own(gpu_compiler, tmp_path):
    x, weights = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16), [jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)] * 2
    ops = {
        "few_row_matmul": (lambda x, _, w: few_row_matmul(x, w, partial=True, implementation="triton"), timing.touch),
        "norm": (lambda x, _, w: add_norm(x, None, w[0], eps=1e-5, implementation="xla")[1], timing.replace),
    }
    for name, (op, follow) in ops.items():
        program = timing.chain(op, 6, follow)
        compile_for(program, x, None, weights, target="h200", donate_argnums=0, dump_to=tmp_path / name)
        schedule = read_schedule(tmp_path / name)
        assert schedule.cuda_graphs == 1 and not schedule.outside_graphs
        launches = collections.Counter(launch.kernel.rstrip("_0123456789") for launch in schedule.launches)
        if name == "norm":  # no two calls became one kernel
            assert sum(launches.values()) >= 6
        else:  # and a link between two calls is one launch, but for two copies that the newest XLA makes in all
            assert launches[name] == 6 and 12 <= sum(launches.values()) <= 14


def entry(rows, config, capability="9.0"):
    return {"capability": capability, "shape": {"rows": rows}, "config": config}


def test_tables_are_merged_in_a_fixed_order(tmp_path, monkeypatch):
    for each in (entry(2, {"a": 1}), entry(1, {"a": 2}), entry(2, {"a": 3}), entry(1, {"a": 4}, "8.0")):
        tune.write_entry(tmp_path, "op", each)
    text = (tmp_path / "op.json").read_text()
    assert json.loads(text)["entries"] == [entry(1, {"a": 4}, "8.0"), entry(1, {"a": 2}), entry(2, {"a": 3})]
    assert len(text.splitlines()) == 7

    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch._table.cache_clear()
    try:
        assert dispatch.tuned("op", dispatch.Gpu("NVIDIA H200", (9, 0), 132), rows=2) == {"a": 3}
    finally:
        dispatch._table.cache_clear()


def make_item(**choices):
    start = {name: values[0] for name, values in choices.items()}
    return tune.Item("few_row_matmul", "x", (), lambda _: (), start, choices)


def test_search_keeps_what_is_fastest_and_does_not_spill():
    def seconds(config):
        if config.get("warps") == 8 and config["n"] == 64:
            return math.inf  # does not compile
        return 1 / (config.get("n", 1) + config.get("warps", 1))

    item = make_item(n=(16, 64, 32), warps=(4, 8))
    best, found, rules, tried = tune.search(item, lambda configs: [seconds(each) for each in configs], lambda _: 0)
    assert (best, found, rules) == ({"n": 64, "warps": 4}, 1 / 68, 1 / 2)
    assert {"config": {"n": 64, "warps": 8}, "seconds": math.inf} in tried

    def spills(config):
        return 8 if config["n"] == 64 else 0

    best, *_ = tune.search(item, lambda configs: [seconds(each) for each in configs], spills)
    assert best == {"n": 32, "warps": 8}


def test_a_candidate_is_what_the_op_finds_in_its_table():
    item = make_item(splits=(3,))
    config = {"block_n": 16, "block_k": 32, "splits": 3, "num_warps": 4, "num_stages": 2}
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 96), (64, 96)))
    with tune.forced(item, config) as asked:
        out = jax.eval_shape(lambda *a: few_row_matmul(*a, partial=True, implementation="triton"), x, weight)
    assert out.shape == (3, 2, 64)
    assert [each["inner"] for each in asked] == [96]
    assert dispatch.tuned("few_row_matmul", None, **asked[0]) == {}


def test_every_item_has_its_start_among_what_the_op_takes():
    for item in tune.items(tiny=True).values():
        assert item.start.keys() >= item.choices.keys()
    titles = list(tune.items())
    assert len(titles) == len(set(titles)) > 30


def test_errors_are_allowed_up_to_those_of_plain_code():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(50, 60))
    plain = exact.astype(jnp.bfloat16)
    noise = np.asarray(plain, np.float64) - exact
    assert numerics.errors(plain, exact, plain, jnp.bfloat16)["passed"]
    assert not numerics.errors(exact + 1.3 * noise, exact, plain, jnp.bfloat16)["passed"]
    assert not numerics.errors(np.where(exact > 3, np.nan, exact), exact, plain, jnp.bfloat16)["passed"]
    assert numerics.rounded_once(jnp.asarray(exact, jnp.bfloat16), exact)["passed"]
    assert not numerics.rounded_once(jnp.asarray(exact * 1.02, jnp.bfloat16), exact)["passed"]


def run_watched(code, tmp_path, patience=60.0, seconds=60.0):
    process = subprocess.Popen([sys.executable, "-c", code])
    return gpu_suite.watch(process, tmp_path / "stage.jsonl", patience, time.monotonic() + seconds)


def test_a_stage_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "START", 0)
    assert run_watched("", tmp_path) == "done"
    assert run_watched("import os; os.abort()", tmp_path) == "crashed with status -6"
    assert run_watched("import time; time.sleep(60)", tmp_path, patience=0.5) == "hung for 0.5 s"
    assert run_watched("import time; time.sleep(60)", tmp_path, seconds=0.5) == "out of time"


def test_what_was_begun_and_not_ended_is_found(tmp_path):
    path = tmp_path / "stage.jsonl"
    for record in ({"begin": "a"}, {"name": "a", "result": {}}, {"begin": "b"}):
        gpu_suite.append(path, record)
    with path.open("a") as file:
        file.write('{"name": "b", "resu')  # killed while it wrote
    records = gpu_suite.read(path)
    assert gpu_suite.settled(records) == {"a"} and gpu_suite.open_unit(records) == "b"
    assert gpu_suite.open_unit(records[:2]) is None


def test_what_a_stage_leaves_the_next_ones_get():
    deadline = gpu_suite.stage_deadlines(["numerics", "kernels", "tune"], 100.0, 90.0)
    assert deadline("numerics", 100.0) == pytest.approx(100 + 90 * 3 / 9)
    assert deadline("kernels", 110.0) == pytest.approx(110 + 80 * 4 / 6)
    assert deadline("tune", 120.0) == pytest.approx(190)
