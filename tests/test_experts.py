"""A model with experts and normed heads as a whole: its tree, its gradient, and its leaves over a mesh."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config import Experts
from dsjax.errors import ConfigError
from dsjax.params import flatten, logical_axes, unflatten, validate
from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.sharding import named_sharding


@pytest.fixture(scope="module")
def params(tiny_config) -> dsjax.Params:
    config = dataclasses.replace(tiny_config, qk_norm="head", experts=Experts(5, 2, 48), num_layers=1)
    params = dsjax.init(config, jax.random.key(0))
    scales = params["layers"]["0"]["attention"]
    for i, name in enumerate(("q_norm", "k_norm")):
        scales[name]["scale"] = jax.random.normal(jax.random.key(i), (16,)) + 1
    return params


def test_prepare_joins_the_experts_matrices(params):
    fused = jax.jit(dsjax.prepare)(params)
    validate(fused)
    experts = fused["layers"]["0"]["mlp"]["experts"]
    assert experts["gate_up"]["weight"].shape == (5, 96, 32) and set(experts) == {"gate_up", "down"}
    chex.assert_trees_all_equal_shapes(fused, jax.eval_shape(dsjax.prepare, dsjax.abstract(params.config)))
    axes = logical_axes(fused)
    assert axes["layers.0.mlp.experts.gate_up.weight"] == ("experts", "mlp", "embed")
    assert set(axes) == set(flatten(fused))
    tokens = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_allclose(dsjax.logits(fused, tokens), dsjax.logits(params, tokens), atol=1e-4)


def test_what_experts_are_chosen_by_is_not_rounded(tiny_config):
    """DeepSeek-V3's corrections differ by less than bfloat16 tells apart."""
    config = dataclasses.replace(tiny_config, experts=Experts(5, 2, 48, correction=True))
    half = dsjax.prepare(dsjax.init(config, jax.random.key(0)), dtype=jnp.bfloat16)
    router = half["layers"]["1"]["mlp"]["router"]
    assert router["correction"].dtype == jnp.float32 and router["weight"].dtype == jnp.bfloat16


def test_quantized_experts_are_joined_as_they_are(params, rng):
    leaves = flatten(params)
    for name in ("gate", "up"):
        leaves[f"layers.0.mlp.experts.{name}.weight"] = QuantizedArray(
            values=jnp.asarray(rng.integers(0, 256, (5, 48, 16)), jnp.uint8),
            scales=jnp.asarray(rng.uniform(size=(5, 48, 1)), jnp.float16),
            minimums=jnp.asarray(rng.uniform(size=(5, 48, 1)), jnp.float16),
            scheme=SCHEMES["q4_1"],
            dtype=jnp.dtype("float32"),
        )
    mixed = unflatten(leaves, params.config)
    fused, plain = (dsjax.prepare(mixed, dequantize=plain) for plain in (False, True))
    joined, expected = (tree["layers"]["0"]["mlp"]["experts"]["gate_up"]["weight"] for tree in (fused, plain))
    assert isinstance(joined, QuantizedArray) and joined.shape == (5, 96, 32)
    np.testing.assert_array_equal(joined.dequantize(), expected)
    np.testing.assert_array_equal(expected[:, :48], leaves["layers.0.mlp.experts.gate.weight"].dequantize())


def test_experts_over_a_mesh(params):
    """A slice of each expert on each device, the router and the heads' norms on all, and the same logits."""
    mesh = jax.make_mesh((2,), ("tensor",))
    axes = logical_axes(params)
    leaves = {
        path: jax.device_put(leaf, named_sharding(mesh, axes[path], leaf.shape))
        for path, leaf in flatten(params).items()
    }
    shapes = {path: leaf.addressable_shards[0].data.shape for path, leaf in leaves.items()}
    assert shapes["layers.0.mlp.experts.gate.weight"] == (5, 24, 32)
    assert shapes["layers.0.mlp.experts.down.weight"] == (5, 32, 24)
    assert shapes["layers.0.mlp.router.weight"] == (5, 32) and shapes["layers.0.attention.q_norm.scale"] == (16,)
    tokens = np.arange(20, dtype=np.int32)[None]
    split = dsjax.logits(unflatten(leaves, params.config), tokens)
    np.testing.assert_allclose(split, dsjax.logits(params, tokens), atol=1e-4)


def test_gradient_equals_transformers(tmp_path, rng):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads, num_local_experts=8, num_experts_per_tok=2))
    with torch.no_grad():  # transformers' small weights leave the router undecided, and its gradient zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    params = dsjax.load(tmp_path)
    tokens = rng.integers(0, 89, (2, 17)).astype(np.int32)
    weights = rng.normal(size=(2, 16)).astype(np.float32)

    logits = model(torch.tensor(tokens).long()).logits[:, :-1]
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens).long()[:, 1:, None])[..., 0]
    (chosen * torch.tensor(weights)).sum().backward()
    grads = jax.grad(lambda p: jnp.sum(dsjax.score(p, tokens)[:, 1:] * weights))(params)

    for i, theirs in enumerate(model.model.layers):
        layer = grads["layers"][str(i)]
        experts = {name: leaf["weight"] for name, leaf in layer["mlp"]["experts"].items()}
        for mine, other in (
            (layer["mlp"]["router"]["weight"], theirs.mlp.gate.weight),
            (jnp.concatenate([experts["gate"], experts["up"]], axis=1), theirs.mlp.experts.gate_up_proj),
            (experts["down"], theirs.mlp.experts.down_proj),
            (layer["mlp_norm"]["scale"], theirs.post_attention_layernorm.weight),
            (layer["attention"]["q"]["weight"], theirs.self_attn.q_proj.weight),
        ):
            assert jnp.abs(mine).max() > 1e-2
            np.testing.assert_allclose(mine, other.grad.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": 0}, "experts.per_token=0 must be from 1 to experts.count=4"),
        ({"per_token": 5}, "experts.per_token=5 must be from 1 to experts.count=4"),
        ({"count": -1}, "experts.per_token=2 must be from 1 to experts.count=-1"),
        ({"size": 0}, "experts of width 0"),
        ({"shared_size": -1}, "shared -1: widths must be positive"),
        ({"groups": 3}, "experts.groups=3 must divide experts.count=4"),
        ({"groups": 2, "groups_per_token": 3}, "experts.groups_per_token=3 must be from 1 to that"),
        ({"groups": 4, "groups_per_token": 1}, "1 of 4 groups hold fewer than 2 experts"),
        ({"groups": 4, "groups_per_token": 2, "group_score": "top2"}, "'top2' needs groups of two experts"),
        ({"score": "sparsemixer", "per_token": 1}, "'sparsemixer' chooses 2 experts, not 1"),
    ],
)
def test_experts_that_contradict_themselves(changes, message):
    with pytest.raises(ConfigError, match=message):
        Experts(**{"count": 4, "per_token": 2, "size": 8} | changes)


def test_experts_of_another_number_of_layers(tiny_config):
    with pytest.raises(ConfigError, match="experts.layers names 3 layers, the model has 2"):
        dataclasses.replace(tiny_config, experts=Experts(4, 2, 8, layers=(True, False, True)))
