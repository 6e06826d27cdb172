"""Checkpoints that are in memory: live modules and state dicts."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dsjax
import policies
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import flatten


def same(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_live_module(save_hf, dtype):
    folder, model = save_hf("qwen2", dtype=getattr(torch, dtype), tie_word_embeddings=True)
    params, expected = dsjax.load(model, dtype=dtype), dsjax.load(folder, dtype=dtype)
    same(params, expected)
    assert params.config == expected.config
    # What is trained on in place does not change the tree, and neither does its end.
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    del model
    gc.collect()
    same(params, expected)


@pytest.mark.parametrize("form", ["torch", "numpy", "jax", "ModelConfig"])
def test_a_state_dict(save_hf, form):
    folder, model = save_hf("llama", dtype=torch.bfloat16)
    state, config = model.state_dict(), model.config.to_dict()
    if form == "numpy":
        state = {name: weight.float().numpy() for name, weight in state.items()}
    elif form == "jax":
        state = {name: jnp.asarray(weight.float().numpy(), jnp.bfloat16) for name, weight in state.items()}
    elif form == "ModelConfig":
        config = policies.load_config(folder)
    same(policies.load(state, config=config), policies.load(folder))
    assert policies.load_config(state, config=config).num_layers == 2


def test_views_are_read_right(save_hf):
    folder, model = save_hf("llama", dtype=torch.bfloat16)
    state = {
        name: weight.t().contiguous().t() if weight.ndim == 2 else weight for name, weight in model.state_dict().items()
    }
    same(policies.load(state, config=model.config.to_dict()), policies.load(folder))


def test_a_mesh_and_schemes(save_hf):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    folder, model = save_hf("llama")
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    ours, theirs = (flatten(policies.load(form, mesh=mesh, quantize="q8_0")) for form in (model, folder))
    for path, leaf in theirs.items():
        jax.tree.map(np.testing.assert_array_equal, ours[path], leaf)
        assert jax.tree.leaves(ours[path])[0].sharding == jax.tree.leaves(leaf)[0].sharding


def test_what_can_not_be_loaded(save_hf):
    _, model = save_hf("llama")
    state, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(ConfigError, match="a dictionary of arrays needs config="):
        policies.load(state)
    with pytest.raises(ConfigError, match="config= goes with a dictionary of arrays"):
        policies.load("folder", config=config)
    with pytest.raises(ConfigError, match="a list can not be loaded; give a path"):
        policies.load([])
    with pytest.raises(ConfigError, match="config is a list; give a ModelConfig or the parsed config.json"):
        policies.load(state, config=[])
    with pytest.raises(ConfigError, match="state dict, config: .*'mamba' is not supported"):
        policies.load(state, config=config | {"model_type": "mamba"})
    with pytest.raises(
        CheckpointError, match="state dict: 'model' is an? OrderedDict, not an array; .* dsjax.from_tree"
    ):
        policies.load({"model": state}, config=config)
    with pytest.raises(
        CheckpointError, match=r"state dict: leaf 'final_norm\.scale' needs tensor 'model\.norm\.weight'"
    ):
        policies.load({k: v for k, v in state.items() if k != "model.norm.weight"}, config=config)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' is of dtype int64, which is not read"):
        policies.load(state | {"model.norm.weight": torch.ones(64, dtype=torch.int64)}, config=config)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: tensor 'model\.\S+' is on torch's meta device"):
        policies.load(model.to("meta"))
