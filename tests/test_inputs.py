"""Bad input: each gets an error that names the thing and the remedy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
import dsjax.params
from dsjax.request import request

GOOD = {"max_new_tokens": 4}


@pytest.mark.parametrize(
    "tokens,options,message",
    [
        ([[1], []], GOOD, "prompt 1 is empty"),
        ([], GOOD, "list of lists"),
        ([1, 2], GOOD, "list of lists"),
        (np.zeros((0, 4), np.int32), GOOD, r"not int32\[0, 4\]"),
        (np.zeros((1, 4), np.float32), GOOD, r"not float32\[1, 4\]"),
        ([[1, 97]], GOOD, "prompt 0 has token id 97 at position 1; ids of this model are 0 to 96"),
        ([[-1]], GOOD, "token id -1"),
        ([[1] * 300], GOOD, "prompt 0 has 300 tokens and may get 4 more; the model's context is 256"),
        ([[1] * 10], {"max_new_tokens": 250}, "lower max_new_tokens"),
        ([[1] * 40], {"max_new_tokens": 30, "page_size": 16, "pages": 4}, "needs 5 pages of 16 tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ([[1]], {**GOOD, "n": 0}, "n must be a whole number of at least 1, got 0"),
        ([[1]], {**GOOD, "temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ([[1]], {**GOOD, "temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ([[1]], {**GOOD, "temperature": 1.0}, "needs key=jax.random.key"),
        ([[1]], {**GOOD, "top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ([[1]], {**GOOD, "top_k": -1}, "top_k must be at least 0"),
        ([[1]], {**GOOD, "min_p": -1}, "min_p must be from 0 to 1"),
        ([[1]], {**GOOD, "repetition_penalty": 0}, "repetition_penalty must be at least"),
        ([[1]], {**GOOD, "temperature": [0.0, 0.0]}, "one for each of 1 prompts"),
        ([[1]], {**GOOD, "limits": 5}, "limits must be from 0 to 4"),
        ([[1]], {**GOOD, "stop_ids": [97]}, "stop_ids has an id outside 0 to 96"),
        ([[1]], {**GOOD, "logit_bias": np.zeros(3)}, "V=97"),
        ([[1]] * 3, {**GOOD, "slots": 3, "token_budget": 2}, "token_budget=2 must be at least slots=3"),
        ([[1]], {**GOOD, "slots": 0}, "slots must be a whole number of at least 1"),
        ([[1]], {**GOOD, "key": jax.random.split(jax.random.key(0), 3)}, "key must be one key or one for each of 1"),
        ([[1]], {**GOOD, "lengths": [1]}, "lengths goes with an array"),
        (np.ones((2, 4), np.int32), {**GOOD, "lengths": [1]}, r"lengths must be \[2\]"),
        (np.ones((2, 4), np.int32), {**GOOD, "lengths": [1, 5]}, "prompt 1 has length 5"),
    ],
)
def test_request_is_refused(tokens, options, message, tiny_params):
    with pytest.raises(dsjax.RequestError, match=message):
        dsjax.generate(tiny_params, tokens, **options)


def test_traced_request_is_refused_at_trace_time(tiny_params):
    """Under a caller's jit the worst case must fit, since lengths are not known."""
    with pytest.raises(dsjax.RequestError, match="needs 4 pages"):
        jax.jit(lambda p, t, n: dsjax.generate(p, t, n, max_new_tokens=30, page_size=16, pages=3))(
            tiny_params, jnp.ones((1, 32), jnp.int32), jnp.array([3])
        )
    with pytest.raises(dsjax.RequestError, match="needs key"):
        jax.jit(lambda p, t: dsjax.generate(p, [[1]], max_new_tokens=3, temperature=t))(tiny_params, 1.0)


def test_wrong_parameter_tree_names_the_leaf(tiny_params, tiny_config):
    leaves = dsjax.params.flatten(tiny_params)
    path = "layers.1.mlp.down.weight"
    for change, message in (
        ({path: leaves[path].T}, rf"leaf '{path}' has shape \[48, 32\], the config asks for \[32, 48\]"),
        ({path: leaves[path].astype(jnp.int32)}, f"leaf '{path}' has dtype int32"),
        ({"layers.1.mlp.extra": leaves[path]}, "leaf 'layers.1.mlp.extra' is unknown"),
    ):
        with pytest.raises(dsjax.ParameterError, match=message):
            dsjax.generate(dsjax.params.unflatten({**leaves, **change}, tiny_config), [[1]], **GOOD)
    missing = {name: leaf for name, leaf in leaves.items() if name != path}
    with pytest.raises(dsjax.ParameterError, match=f"leaf '{path}' is missing"):
        dsjax.score(dsjax.params.unflatten(missing, tiny_config), [[1]])
    with pytest.raises(dsjax.ParameterError, match=r"not a dsjax.Params; wrap a nested dict"):
        dsjax.logits(dict(tiny_params), [[1]])


def test_scoring_refuses_what_the_model_cannot_read(tiny_params):
    with pytest.raises(dsjax.RequestError, match="longer than the model's context, 256"):
        dsjax.score(tiny_params, np.ones((1, 300), np.int32))


def test_config_refuses_what_makes_no_model():
    good = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "max_context": 8,
    }
    dsjax.ModelConfig(**good)
    for change, message in (
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "5 of head_dim=5 are rotated"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"windows": (3,)}, "windows names 1 layers"),
        ({"windows": (3, 0)}, "at least 1 token"),
        ({"rope_scaling": dsjax.RopeScaling("factors", factors=(1.0,))}, "1 factors"),
    ):
        with pytest.raises(dsjax.ConfigError, match=message):
            dsjax.ModelConfig(**{**good, **change})


def test_generate_and_request_take_the_same_arguments():
    assert inspect.signature(dsjax.generate).parameters == inspect.signature(request).parameters
