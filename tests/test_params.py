"""The parameter tree as other libraries see it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import traverse_util

import dsjax
from dsjax.params import flatten, is_fused, leaf_specs, logical_axes, unflatten, validate
from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.sharding import named_sharding


def quantized(rng, out, inner):
    return QuantizedArray(
        values=jnp.asarray(rng.integers(0, 256, (out, inner // 2)), jnp.uint8),
        scales=jnp.asarray(rng.uniform(0.001, 0.02, (out, inner // 32)), jnp.float16),
        minimums=jnp.asarray(rng.uniform(-0.1, 0, (out, inner // 32)), jnp.float16),
        scheme=SCHEMES["q4_1"],
        dtype=jnp.dtype("float32"),
    )


def test_tree_functions_keep_the_config(tiny_params, tiny_config):
    doubled = jax.tree.map(lambda leaf: leaf * 2, tiny_params)
    assert isinstance(doubled, dsjax.Params) and doubled.config == tiny_config
    assert set(traverse_util.flatten_dict(tiny_params, sep=".")) == set(leaf_specs(tiny_config))
    chex.assert_trees_all_equal(unflatten(flatten(tiny_params), tiny_config), tiny_params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tiny_params)]
    assert "['layers']['0']['mlp']['down']['weight']" in paths
    updates, _ = optax.sgd(0.1).update(tiny_params, optax.sgd(0.1).init(tiny_params))
    assert optax.apply_updates(tiny_params, updates).config == tiny_config
    assert "parameters" in repr(tiny_params)


def test_orbax_restores_the_tree(tmp_path, tiny_params, tiny_config):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tiny_params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tree", dsjax.abstract(tiny_config))
    assert restored.config == tiny_config
    chex.assert_trees_all_equal(restored, tiny_params)


def test_shapes_only(tiny_config, tiny_params):
    shapes = dsjax.abstract(tiny_config, jnp.bfloat16)
    validate(shapes)
    chex.assert_trees_all_equal_shapes(shapes, tiny_params)
    axes = logical_axes(tiny_params)
    assert axes["layers.0.attention.k.weight"] == ("kv_heads", "embed")
    assert set(logical_axes(dsjax.prepare(tiny_params))) == set(flatten(dsjax.prepare(tiny_params)))


def test_prepare_changes_the_tree_and_not_the_model(tiny_params):
    fused = jax.jit(dsjax.prepare)(tiny_params)
    validate(fused)
    assert is_fused(fused) and not is_fused(tiny_params)
    tokens = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_allclose(dsjax.logits(fused, tokens), dsjax.logits(tiny_params, tokens), atol=1e-4)
    assert dsjax.prepare(fused, dtype=jnp.bfloat16)["embed"]["weight"].dtype == jnp.bfloat16


def test_prepare_with_a_recipe(tiny_params):
    recipe = {"embed": None, "*": "int8"}
    found = jax.jit(lambda params: dsjax.prepare(params, recipe))(tiny_params)
    expected = jax.jit(lambda params: dsjax.prepare(dsjax.quantize(params, recipe)))(tiny_params)
    chex.assert_trees_all_equal(found, expected)
    assert isinstance(found["layers"]["0"]["attention"]["qkv"]["weight"], QuantizedArray)


def test_gradients_pass_through_prepare(tiny_params):
    tokens = np.arange(20, dtype=np.int32)[None]
    through = jax.grad(lambda p: dsjax.score(dsjax.prepare(p), tokens).sum())(tiny_params)
    straight = jax.grad(lambda p: dsjax.score(p, tokens).sum())(tiny_params)
    chex.assert_trees_all_close(through, straight, rtol=1e-3, atol=1e-4)


def test_quantized_leaves_run_as_what_they_stand_for(tiny_params, rng):
    leaves = flatten(tiny_params)
    for path in leaves:
        if ".weight" in path and leaves[path].shape[-1] % 32 == 0:
            leaves[path] = quantized(rng, *leaves[path].shape)
    mixed = unflatten(leaves, tiny_params.config)
    plain = dsjax.prepare(mixed, dequantize=True)
    assert not any(isinstance(leaf, QuantizedArray) for leaf in flatten(plain).values())
    fused = dsjax.prepare(mixed)
    qkv = fused["layers"]["0"]["attention"]["qkv"]["weight"]
    assert isinstance(qkv, QuantizedArray) and qkv.shape == (128, 32)
    tokens = np.arange(20, dtype=np.int32)[None]
    for tree in (mixed, fused):
        validate(tree)
        np.testing.assert_allclose(dsjax.logits(tree, tokens), dsjax.logits(plain, tokens), atol=1e-4)
    out = dsjax.generate(fused, tokens, max_new_tokens=4)
    np.testing.assert_array_equal(out.tokens, dsjax.generate(plain, tokens, max_new_tokens=4).tokens)


def test_pieces_that_are_stored_differently_stay_apart(tiny_params, rng):
    leaves = flatten(tiny_params)
    path = "layers.0.attention.q.weight"
    leaves[path] = quantized(rng, *leaves[path].shape)
    fused = dsjax.prepare(unflatten(leaves, tiny_params.config))
    assert {"q", "k", "v"} < set(fused["layers"]["0"]["attention"]) and "qkv" in fused["layers"]["1"]["attention"]
    jax.tree.map(np.testing.assert_array_equal, fused["layers"]["0"]["attention"]["q"]["weight"], leaves[path])


def test_params_over_a_mesh(tiny_params):
    """Leaves split by their names, and the same tokens from them."""
    mesh = jax.make_mesh((2,), ("tensor",))
    axes = logical_axes(tiny_params)
    leaves = {
        path: jax.device_put(leaf, named_sharding(mesh, axes[path], leaf.shape))
        for path, leaf in flatten(tiny_params).items()
    }
    assert leaves["layers.0.mlp.gate.weight"].addressable_shards[0].data.shape == (24, 32)
    assert leaves["embed.weight"].addressable_shards[0].data.shape == (97, 32), "97 rows do not split in two"
    split = unflatten(leaves, tiny_params.config)
    prompts = [[9, 8, 7], [11] * 20]
    out, alone = (dsjax.generate(tree, prompts, max_new_tokens=8) for tree in (split, tiny_params))
    np.testing.assert_array_equal(out.tokens, alone.tokens)
    np.testing.assert_allclose(out.logprobs, alone.logprobs, atol=1e-4)
