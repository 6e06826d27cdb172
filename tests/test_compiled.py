"""What a step is once it is compiled for a GPU: the committed budget, and how it is measured."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import pytest

import dsjax
from bench import compiled as bench
from bench.shapes import SHAPES
from dsjax.params import leaf_specs
from pallas_kernels.launches import Launch, Schedule
from pallas_kernels.targets import instructions

BUDGET = json.loads((bench.ROOT / "bench" / "budget.json").read_text())["cases"]


@pytest.mark.parametrize("entry", BUDGET, ids=lambda entry: "-".join(map(str, entry["case"].values())))
def test_steps_are_within_their_budget(gpu_compiler, entry):
    worse = bench.regressions(entry, bench.in_process(bench.Case(**entry["case"])))
    assert not worse, "\n".join(worse)


def test_regressions_are_named():
    figures = {"kernels_per_layer": 9.0, "bytes_ratio": 1.05, "alias_ratio": 1.0, "spill_bytes": 0}
    budget = {kind: figures for kind in bench.STEPS}
    better = {"kernels_per_layer": 5.0, "bytes_ratio": 1.0, "alias_ratio": 1.1, "spill_bytes": 0}
    assert bench.regressions(budget, {kind: better for kind in bench.STEPS}) == []
    worse = {"kernels_per_layer": 9.5, "bytes_ratio": None, "alias_ratio": 0.98, "spill_bytes": 4}
    assert bench.regressions(budget, {"decode": better, "mixed": worse}) == [
        "mixed: kernels_per_layer is 9.5, the budget is 9.0",
        "mixed: bytes_ratio is None, the budget is 1.05",
        "mixed: alias_ratio is 0.98, the budget is 1.0",
        "mixed: spill_bytes is 4, the budget is 0",
    ]
    unknown = {kind: figures | {"bytes_ratio": None} for kind in bench.STEPS}
    assert bench.regressions(unknown, {kind: better for kind in bench.STEPS}) == []


def test_every_figure_has_a_budget():
    for entry in BUDGET:
        bench.Case(**entry["case"])
        for kind in bench.STEPS:
            assert set(entry[kind]) == set(bench.COLUMNS) - {"kernels"}


# Parameters as the models' own pages give them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "llama-3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_have_the_parameters_of_their_models(model):
    assert sum(math.prod(spec.shape) for spec in leaf_specs(SHAPES[model]).values()) == PARAMETERS[model]


def test_bytes_needed(tiny_config):
    for tied in (False, True):
        config = dataclasses.replace(tiny_config, tie_embeddings=tied)
        params = dsjax.abstract(config, jnp.bfloat16)
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        rows_left_out = 0 if tied else config.vocab_size - 8
        assert bench.needed_weights(params, 8) == 2 * (total - rows_left_out * config.hidden_size)


def test_launches_in_layers():
    scopes = {
        "plan": "jit(f)/plan/add",
        "a": "jit(f)/layer_0/mul",
        "b": "jit(f)/layer_11/mlp/add",
        "head": "f/head/dot",
    }
    names = ["copy.1", "plan", "copy.2", "a", "copy.3", "b", "head", "copy.4"]
    launches = [Launch("kCustomKernel", name, name, True, ()) for name in names]
    assert bench.launches_in_layers(Schedule(launches, 8, 1, [], []), scopes) == 3


def test_big_copies():
    text = """HloModule jit_f

%fused (p: bf16[64,32]) -> f32[32,64] {
  %p = bf16[64,32]{1,0} parameter(0)
  %wide = f32[64,32]{1,0} convert(%p)
  ROOT %weight = f32[32,64]{1,0} transpose(%wide), dimensions={1,0}
}

ENTRY %main (w: bf16[64,32], x: bf16[2,32], pages: bf16[100,4,8,16]) -> f32[32,64] {
  %w = bf16[64,32]{1,0} parameter(0)
  %x = bf16[2,32]{1,0} parameter(1)
  %pages = bf16[100,4,8,16]{3,2,1,0} parameter(2)
  %small = bf16[32,2]{1,0} transpose(%x), dimensions={1,0}
  %row = bf16[1,32]{1,0} dynamic-slice(%w, %x), dynamic_slice_sizes={1,32}
  %wider = bf16[64,32]{1,0} broadcast(%x), dimensions={0,1}
  %activation = bf16[64,32]{0,1} copy(%wider)
  %updated = bf16[100,4,8,16]{3,2,1,0} custom-call(%pages, %x), custom_call_target="update"
  %cache = bf16[100,4,8,16]{3,2,1,0} copy(%updated)
  ROOT %out = f32[32,64]{1,0} fusion(%w), kind=kLoop, calls=%fused
}
"""

    class Program(jax.stages.Compiled):
        def __init__(self):
            pass

        def as_text(self):
            return text

    params = {"w": jnp.zeros((64, 32)), "scale": jnp.zeros(64)}
    pages = dsjax.ragged.KVPages((jnp.zeros((100, 4, 8, 16)),), (jnp.zeros((100, 4, 8, 16)),))
    assert [each.name for each in bench.big_copies(instructions(Program()), params, pages)] == ["weight", "cache"]


def test_without_the_plugin(monkeypatch, capsys):
    monkeypatch.setattr(bench, "available", lambda: "the plugin is not installed")
    monkeypatch.setattr(sys, "argv", ["bench.compiled"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert bench.main() == 2
    assert "the plugin is not installed" in capsys.readouterr().err


def test_a_failed_case_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match="invalid choice: 'h300'"):
        bench.in_process(bench.Case("llama-3.1-8b", "h300"))
