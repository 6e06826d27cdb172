"""Quantized weights and pages in the whole model: what comes out is what their dequantized twins give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config import Experts
from dsjax.errors import RequestError
from dsjax.params import flatten
from dsjax.quantization import QuantizedArray

PROMPTS = [[(7 * i) % 89 for i in range(35)], [9, 8, 7]]
OPTIONS = {"max_new_tokens": 6, "page_size": 16, "ignore_eos": True}
RECIPE = {
    "embed": "int8",
    "q.weight": "int4_asym",
    "k.weight": "int4_asym",
    "v.weight": "int4_asym",
    "out.weight": "fp8_e4m3",
    "gate.weight": "int4",
    "up.weight": "int4",
    "down.weight": "nf4",
    "head": "fp6",
}


@pytest.fixture(scope="module")
def wide(tiny_config):
    """Parameters whose rows are whole groups; the second layer has experts."""
    config = dataclasses.replace(
        tiny_config,
        hidden_size=128,
        intermediate_size=128,
        head_dim=32,
        experts=Experts(4, 2, 128, layers=(False, True)),
    )
    return dsjax.init(config, jax.random.key(0))


def test_generation_with_quantized_weights(wide):
    params = dsjax.prepare(dsjax.quantize(wide, RECIPE))
    schemes = {leaf.scheme.name for leaf in flatten(params).values() if isinstance(leaf, QuantizedArray)}
    assert schemes == set(RECIPE.values())
    found = dsjax.generate(params, PROMPTS, **OPTIONS)
    expected = dsjax.generate(dsjax.prepare(params, dequantize=True), PROMPTS, **OPTIONS)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_tiles_on_interpreted_kernels(wide):
    """Tiled leaves through the kernels, in bfloat16, against rows through plain XLA."""
    params = dsjax.prepare(dsjax.quantize(wide, {"embed": None, "*": "int4"}), dtype=jnp.bfloat16)
    tiled = dsjax.prepare(params, tiled=True)
    layouts = {path: leaf.layout for path, leaf in flatten(tiled).items() if isinstance(leaf, QuantizedArray)}
    assert set(layouts.values()) == {"tiles"} and any("experts" in path for path in layouts)
    found = dsjax.generate(tiled, PROMPTS, **OPTIONS, implementation="triton")
    expected = dsjax.generate(params, PROMPTS, **OPTIONS)
    np.testing.assert_allclose(found.logprobs[:, :, 0], expected.logprobs[:, :, 0], atol=0.05)


def test_activations_in_8_bits(wide):
    """The scheme says so, and then every product does, however many rows there are."""
    exact = dsjax.generate(dsjax.quantize(wide, "int8"), PROMPTS, **OPTIONS)
    found = dsjax.generate(dsjax.quantize(wide, "int8_w8a8"), PROMPTS, **OPTIONS)
    difference = np.abs(np.asarray(found.logprobs - exact.logprobs))[:, :, 0]
    assert 0 < difference.max() < 0.1


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.02), ("fp8", 0.1)])
def test_quantized_pages(wide, dtype, most):
    expected = dsjax.generate(wide, PROMPTS, **OPTIONS)
    found = dsjax.generate(wide, PROMPTS, **OPTIONS, kv_dtype=dtype)
    difference = np.abs(np.asarray(found.logprobs - expected.logprobs))[:, :, 0]
    assert 0 < difference.max() < most


def test_pages_of_another_dtype_are_refused(wide):
    with pytest.raises(RequestError, match="kv_dtype='int4' is not supported; pages can be float32, .*int8, .*fp8"):
        dsjax.generate(wide, PROMPTS, **OPTIONS, kv_dtype="int4")


def test_no_recompilation_for_new_weights(wide):
    """Quantized anew after each step of training, under a caller's `jit`: one program."""

    @jax.jit
    def rollout(params, key):
        return dsjax.generate(dsjax.quantize(params, "int8"), jnp.ones((1, 4), jnp.int32), max_new_tokens=3, key=key)

    first = rollout(wide, jax.random.key(0))
    rollout(jax.tree.map(lambda leaf: leaf * 1.01, wide), jax.random.key(1))
    assert rollout._cache_size() == 1 and first.tokens.shape == (1, 1, 3)
