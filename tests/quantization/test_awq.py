"""Scaling for the inputs that weights meet: what is found of these, and what it does to the error of products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.params import flatten, unflatten
from dsjax.quantization import QuantizedArray, quantize, scheme
from dsjax.quantization.awq import quantize_for_inputs
from dsjax.quantization.inputs import weight_inputs


def test_inputs_are_those_of_the_products(rng):
    params = {
        name: {"weight": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)} for name in ("up", "down", "mid")
    }
    x = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)

    @jax.jit
    def model(params):
        hidden = jax.nn.silu(x @ params["up"]["weight"].T)  # transposed first: not recognized
        out = jax.lax.dot_general(params["down"]["weight"].astype(jnp.bfloat16), hidden, (((1,), (2,)), ((), ())))
        jax.lax.fori_loop(0, 2, lambda _, y: y @ params["mid"]["weight"], out[:, 0, 0])
        return jax.nn.relu(out), hidden

    hidden = np.asarray(model(params)[1], np.float32).reshape(10, 64)
    found = jax.jit(lambda params: weight_inputs(model, params, rows=5))(params)
    assert set(found) == {"down.weight"}
    np.testing.assert_allclose(found["down.weight"], hidden[::2], rtol=1e-5, atol=1e-5)
    assert weight_inputs(model, params, rows=100)["down.weight"].shape == (10, 64)


@pytest.fixture(scope="module")
def calibrated(tiny_config):
    """A model whose residual stream has a few channels that are far larger than the rest, as trained ones have."""
    config = dataclasses.replace(tiny_config, num_layers=1)
    leaves = flatten(dsjax.init(config, jax.random.key(0)))
    loud = jnp.ones(32).at[jnp.array([3, 17, 20])].set(30.0)
    leaves = {path: leaf * loud if "norm" in path else leaf for path, leaf in leaves.items()}
    params = unflatten(leaves, config)
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 97)
    inputs = jax.jit(lambda params: weight_inputs(lambda params: dsjax.logits(params, tokens), params, 64))(params)
    recipe = {"attention": "int4", "up": "int4_asym", "embed": "int8"}
    return params, inputs, recipe, quantize_for_inputs(params, recipe, lambda params: dsjax.logits(params, tokens))


def test_every_product_of_the_model_is_found(calibrated):
    params, inputs, _, _ = calibrated
    wanted = {path for path, leaf in flatten(params).items() if leaf.ndim == 2} - {"embed.weight"}
    assert set(inputs) == wanted
    assert all(x.shape == (64, flatten(params)[path].shape[1]) for path, x in inputs.items())


def test_products_change_less(calibrated):
    params, inputs, recipe, scaled = calibrated
    plain = flatten(quantize(params, recipe))
    for path, leaf in flatten(scaled).items():
        if not isinstance(leaf, QuantizedArray) or path == "embed.weight":
            continue
        assert leaf.scheme == scheme(plain[path].scheme.name) and leaf.input_scale.shape == leaf.shape[-1:]
        x, weight = (np.asarray(array, np.float64) for array in (inputs[path], flatten(params)[path]))
        before, after = (
            np.linalg.norm(x @ (weight - np.asarray(one.dequantize(), np.float64)).T) for one in (plain[path], leaf)
        )
        assert after <= before * 1.001
        if leaf.scheme.bits == 4 and "out" not in path:
            assert after < 0.7 * before, path
    assert flatten(scaled)["embed.weight"].input_scale is None


def test_projections_of_one_input_can_be_joined(calibrated):
    *_, scaled = calibrated
    leaves = flatten(scaled)
    q, k = (leaves[f"layers.0.attention.{name}.weight"] for name in "qk")
    np.testing.assert_array_equal(q.input_scale, k.input_scale)
    ready = flatten(jax.jit(dsjax.prepare)(scaled))
    joined = ready["layers.0.attention.qkv.weight"]
    np.testing.assert_array_equal(joined.input_scale, q.input_scale)
    np.testing.assert_allclose(joined[:64].dequantize(), q.dequantize(), rtol=1e-6)
    assert leaves["layers.0.attention.out.weight"].has_own_inputs
