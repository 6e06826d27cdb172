"""Which leaves of a tree are stored how."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config import Experts
from dsjax.errors import ConfigError, ParameterError
from dsjax.params import flatten
from dsjax.quantization import QuantizedArray, quantize


@pytest.fixture(scope="module")
def params(tiny_config):
    experts = Experts(4, 2, 64, shared_size=32, shared_mix="gate")
    config = dataclasses.replace(tiny_config, intermediate_size=64, experts=experts, attention_bias=True, num_layers=2)
    return dsjax.init(config, jax.random.key(0))


def schemes(tree):
    return {path: leaf.scheme.name for path, leaf in flatten(tree).items() if isinstance(leaf, QuantizedArray)}


def shapes(params, recipe):
    return schemes(jax.eval_shape(lambda params: quantize(params, recipe), params))


def test_a_scheme_alone(params):
    quantized = jax.jit(lambda params: quantize(params, "int8"))(params)
    assert type(quantized) is dsjax.Params and quantized.config == params.config
    kept = {path for path in flatten(params) if path not in schemes(quantized)}
    assert {path.removeprefix("layers.0.") for path in kept if not path.startswith("layers.1.")} == {
        "attention_norm.scale",
        "attention.q.bias",
        "attention.k.bias",
        "attention.v.bias",
        "mlp_norm.scale",
        "mlp.router.weight",
        "mlp.shared_gate.weight",
        "final_norm.scale",
    }
    for path, leaf in flatten(params).items():
        if path in kept:
            assert flatten(quantized)[path] is not None
            np.testing.assert_array_equal(flatten(quantized)[path], leaf)
    assert "embed.weight" in schemes(quantized) and "layers.1.mlp.experts.down.weight" in schemes(quantized)


def test_before_and_after_projections_are_joined(params):
    recipe = {"mlp.experts": "mxfp4", "mlp": "fp8_tensor", "*": "int8"}
    after = shapes(jax.eval_shape(dsjax.prepare, params), recipe)
    before = schemes(jax.eval_shape(lambda params: dsjax.prepare(quantize(params, recipe)), params))
    assert after.pop("layers.0.mlp.shared.gate_up.weight") == "fp8_e4m3_tensor"
    assert before.pop("layers.0.mlp.shared.gate_up.weight") == "fp8_e4m3"  # each part keeps its scale
    for kinds in (before, after):
        kinds.pop("layers.1.mlp.shared.gate_up.weight")
    assert before == after and before["layers.0.attention.qkv.weight"] == "int8"


def test_the_first_pattern_that_matches_decides(params):
    found = shapes(
        params,
        {"embed": None, "layers.1.*.down.weight": "int8", "mlp.experts": "mxfp4", "layers.0.*": "fp8", "router": "fp6"},
    )
    down = "mlp.experts.down.weight"
    assert "embed.weight" not in found and found[f"layers.1.{down}"] == "int8" and found[f"layers.0.{down}"] == "mxfp4"
    assert found["layers.0.attention.q.weight"] == "fp8_e4m3" and "layers.1.attention.q.weight" not in found
    # Routers are quantized only if nothing else is meant.
    assert found["layers.0.mlp.router.weight"] == "fp6" and "layers.0.mlp.shared_gate.weight" not in found


def test_leaves_that_are_quantized_already(params):
    one = {"layers": {"0": {"up": {"weight": jnp.ones((4, 64))}, "norm": {"scale": jnp.ones(64)}}}}
    first = quantize(one, "int8")
    again = quantize(first, "int8")
    assert again["layers"]["0"]["up"]["weight"] is first["layers"]["0"]["up"]["weight"]
    other = quantize(first, "int4", fit="hqq")["layers"]["0"]["up"]["weight"]
    assert other.scheme.name == "int4"
    np.testing.assert_allclose(other.dequantize(), 1, rtol=0.01)


@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        ("int3", ConfigError, "'int3' is unknown"),
        ({"attn": "int8"}, ConfigError, r"'attn' of the recipe matches no leaf; .* layers\.\*\.attention\.q\.weight"),
        ({"attention.Q": "int8"}, ConfigError, "matches no leaf"),
        (
            {"mlp_norm": "int8"},
            ParameterError,
            r"'layers.0.mlp_norm.scale' \[32\], which is no matrix; norms and biases",
        ),
        ({"attention.*.bias": "int4"}, ConfigError, "matches no leaf"),
        ({"*.bias": "int4"}, ParameterError, "'layers.0.attention.k.bias'"),
        ({"*.down.weight": "int4_g128"}, ParameterError, r"leaf 'layers.0.mlp.*down.weight'.*rows of"),
    ],
)
def test_wrong_use(params, recipe, kind, message):
    with pytest.raises(kind, match=message):
        quantize(params, recipe)
