"""Checkpoints whose experts are tensors of their own, and leaves that stack them."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import policies
from dsjax.config import Experts
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import flatten, init
from dsjax.quantization import SCHEMES, QuantizedArray
from policies.base import write_tensors
from policies.families.mixtral import MIXTRAL
from policies.families.qwen3 import QWEN3
from policies.ops import Stack

EXPERTS = dict(model_type="mixtral", experts=Experts(count=3, per_token=2, size=96))


@pytest.fixture
def folder(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_every_tensor_of_the_file_comes_back(folder):
    params = policies.load(folder, dtype="float32")
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in stored
    written = dict(write_tensors(params, MIXTRAL))
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    experts = params["layers"]["1"]["mlp"]["experts"]
    for leaf, tensor in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        expected = stored[f"model.layers.1.block_sparse_moe.experts.2.{tensor}.weight"]
        np.testing.assert_array_equal(experts[leaf]["weight"][2], expected)


W3 = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            W3.format(2),
            None,
            r"'layers\.1\.mlp\.experts\.up\.weight' needs tensor '.*\.2\.w3\.weight' of shape \[96, 64\]",
        ),
        (W3.format(3), (96, 64), r"tensor '.*\.3\.w3\.weight' \[96, 64\] has no place in a mixtral"),
        (W3.format(0), (96, 65), r"'.*\.0\.w3\.weight' has shape \[96, 65\], .* needs \[96, 64\]"),
    ],
)
def test_experts_that_do_not_fit(make_config, name, shape, message):
    config = make_config(**EXPERTS)
    tensors = dict(write_tensors(init(config, jax.random.key(0)), MIXTRAL))
    shapes = {tensor: leaf.shape for tensor, leaf in tensors.items()} | {name: shape}
    shapes = {tensor: shape for tensor, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        MIXTRAL.weights.fit(config, shapes, "x")


def test_quantized_tensors_are_stacked_as_they_are(rng):
    tensors = [
        QuantizedArray(
            values=rng.integers(-128, 128, (4, 32)).astype(np.int8),
            scales=rng.normal(size=(4, 1)).astype(np.float16),
            minimums=None,
            scheme=SCHEMES["q8_0"],
            dtype=np.dtype(np.float32),
        )
        for _ in range(3)
    ]
    (leaf,) = Stack().to_leaves(tensors, None, [(3, 4, 32)])
    assert leaf.shape == (3, 4, 32) and leaf.scheme == SCHEMES["q8_0"]
    for tensor, back in zip(tensors, Stack().to_tensors([leaf], None), strict=True):
        jax.tree.map(np.testing.assert_array_equal, back, tensor)


def test_normed_heads_and_experts_have_no_place_in_other_families(make_config):
    params = init(make_config(model_type="qwen3", qk_norm="head"), jax.random.key(0))
    tensors = dict(write_tensors(params, QWEN3))
    assert tensors["model.layers.1.self_attn.k_norm.weight"] is params["layers"]["1"]["attention"]["k_norm"]["scale"]
    assert len(tensors) == len(flatten(params))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    plain = dataclasses.replace(params.config, model_type="llama", qk_norm=None)
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.0\.self_attn\.k_norm\.weight' \[16\] has no place in a ll"
    ):
        policies.get("llama").weights.fit(plain, shapes, "x")
    with pytest.raises(ConfigError, match="no entry of the weight map fills leaf 'layers.0.mlp.router.weight'"):
        policies.get("mistral").weights.steps(make_config(**EXPERTS))


def test_a_map_without_what_its_family_needs():
    broken = dataclasses.replace(MIXTRAL, name="mine", model_types=("mine",), weights=policies.get("llama").weights)
    with pytest.raises(ConfigError, match="no entry of the weight map fills leaf 'layers.0.mlp.router.weight'"):
        policies.register(broken)
