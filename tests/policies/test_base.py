import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import flatten, init, leaf_specs, prepare
from dsjax.quantization import SCHEMES, QuantizedArray
from policies.base import Entry, WeightMap, read_leaves, write_tensors
from policies.families.llama import LLAMA
from policies.families.qwen2 import QWEN2
from policies.gguf_models import gguf_weights
from policies.ops import InterleavedRotary


class Memory:
    """Tensors of a dictionary, and a record of what was read."""

    origin = "memory"

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name]


def tensors_of(params, policy):
    return dict(write_tensors(params, policy))


@pytest.fixture
def checkpoint(make_config):
    config = make_config()
    return config, tensors_of(init(config, jax.random.key(0)), LLAMA)


configs = st.builds(
    ModelConfig,
    model_type=st.just("llama"),
    vocab_size=st.integers(1, 9),
    hidden_size=st.integers(1, 9),
    intermediate_size=st.integers(1, 9),
    num_layers=st.integers(1, 12),
    num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 6]),
    max_context=st.just(8),
    attention_bias=st.booleans(),
    attention_out_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tie_embeddings=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(config=configs, gguf_rows=st.booleans())
def test_round_trip(config, gguf_rows):
    draw = np.random.default_rng(0)
    leaves = {path: draw.standard_normal(spec.shape) for path, spec in leaf_specs(config).items()}
    weights = gguf_weights("llama") if gguf_rows else LLAMA.weights
    tensors = {}
    for step in weights.steps(config):
        if step.leaves[0] in leaves:
            values = step.op.to_tensors([leaves[leaf] for leaf in step.leaves], config)
            tensors.update(zip(step.tensors, values, strict=True))
    assert len(tensors) == len(leaves)
    source = Memory(tensors)
    back = dict(read_leaves(weights.fit(config, source.shapes(), source.origin), config, source))
    assert back.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf)
    assert sorted(source.reads) == sorted(tensors)


def test_write_tensors_names(make_config):
    params = init(make_config(attention_bias=True, model_type="qwen2"), jax.random.key(0))
    tensors = tensors_of(params, QWEN2)
    assert tensors["model.layers.1.self_attn.o_proj.weight"] is params["layers"]["1"]["attention"]["out"]["weight"]
    assert tensors["lm_head.weight"] is params["head"]["weight"]
    assert "model.layers.0.self_attn.q_proj.bias" in tensors and "model.layers.0.self_attn.o_proj.bias" not in tensors
    assert len(tensors) == len(flatten(params))


def test_fused_trees_are_not_written(make_config):
    params = init(make_config(), jax.random.key(0))
    with pytest.raises(ParameterError, match="fused by dsjax.prepare.*write the tree that dsjax.load returned"):
        tensors_of(prepare(params), LLAMA)


def test_interleaved_rows():
    config = ModelConfig("llama", 4, 4, 4, 1, 2, 1, head_dim=6, max_context=8)
    rows = np.arange(12)
    (leaf,) = InterleavedRotary().to_leaves([rows], config, [rows.shape])
    assert leaf.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    (tensor,) = InterleavedRotary().to_tensors([leaf], config)
    assert tensor.tolist() == rows.tolist()


def test_quantized_rows_stay_whole(make_config):
    config = make_config()
    draw = np.random.default_rng(0)
    quantized = QuantizedArray(
        values=draw.integers(0, 256, (64, 32), np.uint8),
        scales=draw.standard_normal((64, 2)).astype(np.float16),
        minimums=draw.standard_normal((64, 2)).astype(np.float16),
        scheme=SCHEMES["q4_1"],
        dtype=np.dtype(np.float32),
    )
    (leaf,) = InterleavedRotary().to_leaves([quantized], config, [quantized.shape])
    (plain,) = InterleavedRotary().to_leaves([np.asarray(quantized.dequantize())], config, [quantized.shape])
    np.testing.assert_array_equal(leaf.dequantize(), plain)
    assert not np.array_equal(plain, quantized.dequantize())


def test_missing_tensor_names_leaf_and_tensor(checkpoint):
    config, tensors = checkpoint
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"'layers\.1\.mlp\.up\.weight'.*'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        LLAMA.weights.fit(config, Memory(tensors).shapes(), "x")


def test_wrong_shape_names_both_and_reads_nothing(checkpoint):
    config, tensors = checkpoint
    name = "model.layers.0.self_attn.k_proj.weight"
    source = Memory(tensors | {name: np.zeros((33, 64))})
    message = r"x: tensor '.*k_proj\.weight' has shape \[33, 64\].*'layers\.0\.attention\.k\.weight'.*\[32, 64\]$"
    with pytest.raises(CheckpointError, match=message):
        LLAMA.weights.fit(config, source.shapes(), "x")
    assert not source.reads


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "extra"])
def test_a_tensor_without_a_leaf_is_an_error(checkpoint, name):
    config, tensors = checkpoint
    with pytest.raises(CheckpointError, match=f"tensor '{name}'.* has no place"):
        LLAMA.weights.fit(config, Memory(tensors | {name: np.zeros(3)}).shapes(), "x")


def test_further_problems_are_counted(checkpoint):
    config, tensors = checkpoint
    with pytest.raises(CheckpointError, match=r"\(and 1 more\)$"):
        LLAMA.weights.fit(config, Memory(tensors | {"a": np.zeros(3), "b": np.zeros(3)}).shapes(), "x")


def test_ignored_and_redundant_tensors(checkpoint):
    config, tensors = checkpoint
    tied = dataclasses.replace(config, tie_embeddings=True)
    source = Memory(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8)})
    leaves = dict(read_leaves(LLAMA.weights.fit(tied, source.shapes(), "x"), tied, source))
    assert "head.weight" not in leaves and "lm_head.weight" not in source.reads
    assert leaves.keys() == leaf_specs(tied).keys()


FULL = LLAMA.weights.entries


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((*FULL, Entry("embed.weight", "other")), "two entries of the weight map fill leaf 'embed.weight'"),
        ((*FULL, Entry("layers.0.mlp.up.weight", "other")), "fill leaf 'layers.0.mlp.up.weight'"),
        (
            (Entry("embed.weight", "t"), Entry("head.weight", "t")),
            "two entries of the weight map use tensor 't'",
        ),
        ((*FULL, Entry("layers.{i}.mlp.sideways.weight", "other.{i}")), "'layers.0.mlp.sideways.weight'.*no model has"),
        (FULL[1:], "no entry of the weight map fills leaf 'embed.weight'"),
    ],
)
def test_contradictory_maps(make_config, entries, message):
    with pytest.raises(ConfigError, match=message):
        WeightMap(entries).steps(make_config())
    with pytest.raises(ConfigError, match=message):
        policies.register(dataclasses.replace(LLAMA, name="mine", model_types=("mine",), weights=WeightMap(entries)))
    assert "mine" not in policies.supported()


def test_unknown_architecture_lists_the_supported():
    with pytest.raises(ConfigError, match="'mamba' is not supported; supported are: .*llama, .*qwen2, .*qwen3"):
        policies.get("mamba")


def test_third_parties_can_register():
    mine = dataclasses.replace(LLAMA, name="mine", model_types=("mine", "mine2"))
    try:
        policies.register(mine)
        assert policies.get("mine2") is mine and "mine" in policies.supported()
        again = dataclasses.replace(mine, model_types=("mine",))
        policies.register(again)
        assert policies.get("mine") is again and "mine2" not in policies.supported()
        with pytest.raises(ConfigError, match="'llama' is already served by the policy 'llama'"):
            policies.register(dataclasses.replace(mine, model_types=("llama",)))
    finally:
        for model_type in ("mine", "mine2"):
            policies.registry._POLICIES.pop(model_type, None)
