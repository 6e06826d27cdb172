"""config.json of the GPT-like families: as published, and what they must refuse; tensor names of older checkpoints."""

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from dsjax.errors import ConfigError
from dsjax.params import leaf_specs
from policies import registry
from policies.alibi import alibi_bias_max, alibi_slopes

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT_SIZES = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
# The smallest config.json that each family takes: what it leaves out, transformers' classes have defaults for.
SMALLEST = {
    "gpt2": GPT_SIZES,
    "opt": {**SIZES, "max_position_embeddings": 32, "ffn_dim": 24},
    "biogpt": {**SIZES, "max_position_embeddings": 32, "intermediate_size": 24},
    "falcon": SIZES,
    "gpt_neox": {**SIZES, "max_position_embeddings": 32, "intermediate_size": 24},
    "gptj": {**GPT_SIZES, "rotary_dim": 4},
    "phi": {**SIZES, "max_position_embeddings": 32, "intermediate_size": 24},
    "bloom": SIZES,
    "mpt": {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "gpt_neo": {**SIZES, "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]]},
    "gpt_bigcode": GPT_SIZES,
    "codegen": {**GPT_SIZES, "rotary_dim": 4},
}
# As published, but for fields that do not matter here.
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}
OPT_350M = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
FALCON_40B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "hidden_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "parallel_attn": True,
    "vocab_size": 65024,
}
NEOX_20B = {
    "attention_probs_dropout_prob": 0,
    "hidden_act": "gelu_fast",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "vocab_size": 50432,
}
MPT_7B = {
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "verbose": 0,
    "vocab_size": 50432,
}
SANTACODER = {
    "activation_function": "gelu_pytorch_tanh",
    "attention_softmax_in_fp32": True,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 2048,
    "n_head": 16,
    "n_inner": 8192,
    "n_layer": 24,
    "n_positions": 2048,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_use_proj": True,
    "vocab_size": 49280,
}


def read(raw):
    return registry.get(raw["model_type"]).read_config(raw)


def small(family, **changes):
    return {"model_type": family, **SMALLEST[family], **changes}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (BLOOM_560M, {"hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "max_context": 2048}),
        (OPT_350M, {"norm_placement": "post", "final_norm": False, "embed_size": 512, "learned_positions": 2050}),
        (FALCON_40B, {"num_kv_heads": 8, "shared_norm": False, "activation": "gelu", "rope_theta": 10000.0}),
        (NEOX_20B, {"rotary_dim": 24, "parallel_block": True, "activation": "gelu_tanh", "attention_bias": True}),
        (MPT_7B, {"norm_bias": False, "clip_qkv": None, "attention_scale": None, "intermediate_size": 16384}),
        (SANTACODER, {"num_kv_heads": 1, "intermediate_size": 8192, "attention_scale": None}),
    ],
    ids=lambda value: value.get("model_type", ""),
)
def test_published_configs(raw, expected):
    config = read(raw)
    assert {name: getattr(config, name) for name in expected} == expected
    assert read(registry.get(config.model_type).write_config(config)) == config


@pytest.mark.parametrize("family", SMALLEST)
def test_defaults_of_absent_fields_write_and_read_back(family):
    config = read(small(family))
    assert config.norm_eps == 1e-5
    assert read(registry.get(family).write_config(config)) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (small("bloom", apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm"),
        (small("bloom", n_embed=64), "n_embed"),
        (small("bloom", n_inner=32), "n_inner"),
        (small("falcon", multi_query=False, num_kv_heads=2), "num_kv_heads"),
        (small("falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn"),
        (small("falcon", new_decoder_architecture=True, parallel_attn=False), "parallel_attn"),
        (small("gptj", rotary=False), "rotary"),
        (small("gptj", rotary_dim=None), "rotary_dim"),
        (small("codegen", n_head=2), "n_head"),
        (small("gpt2", add_cross_attention=True), "add_cross_attention"),
        (small("gpt_neo", attention_types=[[["global"], 3]]), "3 layers"),
        (small("gpt_neo", attention_types=["global"]), "attention_types"),
        (small("gpt_neo", attention_types=[[["global", "sparse"], 1]]), "sparse"),
        (small("gpt_neo", attention_layers=["local", "global"]), "attention_layers"),
        (small("mpt", attn_config={"qk_ln": True}), "qk_ln"),
        (small("mpt", attn_config={"alibi": False}), "alibi"),
        (small("mpt", no_bias=False), "no_bias"),
        (small("mpt", logit_scale=2.0), "logit_scale"),
        (small("opt", activation_function="tanh"), "activation_function"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value["model_type"],
)
def test_what_is_not_computed_is_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        read(raw)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 71, 112])
def test_alibi_slopes(heads):
    of_bloom = _get_alibi_slopes(heads, torch.device("cpu")).numpy()
    np.testing.assert_allclose(alibi_slopes(heads), of_bloom, rtol=1e-5)
    for bias_max in (8, 16):
        of_mpt = -build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0].numpy()
        slopes = alibi_slopes(heads, bias_max)
        np.testing.assert_allclose(slopes, of_mpt, rtol=1e-6)
        assert alibi_bias_max(slopes) == bias_max


@pytest.mark.parametrize(
    ("family", "prefix", "buffers"),
    [
        ("gpt2", "transformer.", ("h.0.attn.bias", "h.1.attn.masked_bias")),
        ("gptj", "transformer.", ("h.0.attn.bias", "h.1.attn.embed_positions")),
        ("gpt_neo", "transformer.", ("h.0.attn.attention.bias", "h.1.attn.attention.masked_bias")),
        ("codegen", "transformer.", ("h.0.attn.causal_mask",)),
        ("bloom", "transformer.", ()),
        ("opt", "model.", ()),
        ("biogpt", "biogpt.", ()),
        ("gpt_neox", "gpt_neox.", ("layers.0.attention.masked_bias", "layers.1.attention.rotary_emb.inv_freq")),
    ],
)
def test_names_with_and_without_prefix_and_old_buffers(family, prefix, buffers):
    policy = registry.get(family)
    config = read(small(family))
    specs, shapes = leaf_specs(config), {}
    for step in policy.weights.steps(config):
        if step.leaves[0] in specs:
            leaves = [specs[leaf].shape for leaf in step.leaves]
            shapes |= dict(zip(step.tensors, step.op.tensor_shapes(leaves, config), strict=True))
    named = policy.weights.fit(config, shapes | {prefix + name: (1,) for name in buffers}, "a file")
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items()} | dict.fromkeys(buffers, (1,))
    for with_prefix, without in zip(named, policy.weights.fit(config, bare, "a file"), strict=True):
        assert with_prefix.leaves == without.leaves
        assert [name.removeprefix(prefix) for name in with_prefix.tensors] == list(without.tensors)


def test_gpt_neox_head_as_files_and_as_modules_name_it():
    policy, config = registry.get("gpt_neox"), read(small("gpt_neox"))
    for name in ("embed_out.weight", "lm_head.weight"):
        (step,) = [step for step in policy.weights.steps(config, {name}) if step.leaves == ("head.weight",)]
        assert step.tensors == (name,)
