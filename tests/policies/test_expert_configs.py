"""Families with experts and latent attention: published configurations, and what is refused."""

import json
import math

import numpy as np
import pytest

import policies
from dsjax.errors import ConfigError
from dsjax.params import leaf_specs

# config.json as published, without what no family's mathematics read, and how many parameters the model card counts.
PUBLISHED = {
    "Qwen/Qwen3-30B-A3B": (
        30_532_122_624,
        """{"attention_bias": false, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936}""",
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        """{"bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151936}""",
    ),
    "openai/gpt-oss-20b": (
        20_914_757_184,
        """{"attention_bias": true, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": LAYER_TYPES, "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": false}, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
        "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false, "vocab_size": 201088}""".replace(
            "LAYER_TYPES", json.dumps(["sliding_attention", "full_attention"] * 12)
        ),
    ),
    # Without the layer that predicts a second token, which its 685 B include.
    "deepseek-ai/DeepSeek-V3": (
        671_026_419_200,
        """{"attention_bias": false, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129280}""",
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        15_706_484_224,
        """{"attention_bias": false, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400}""",
    ),
    "microsoft/Phi-3.5-MoE-instruct": (
        41_873_153_344,
        """{"attention_bias": true, "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu",
        "hidden_size": 4096, "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": true,
        "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "original_max_position_embeddings": 4096, "output_router_logits": false, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": FACTORS, "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096, "short_factor": FACTORS, "short_mscale": 1.243163121016122,
        "type": "longrope"}, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
        "sliding_window": 131072, "tie_word_embeddings": false, "vocab_size": 32064}""".replace(
            "FACTORS", json.dumps([1.0 + i for i in range(64)])
        ),
    ),
}


def read(raw):
    return policies.get(raw["model_type"]).read_config(raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    count, text = PUBLISHED[name]
    config = read(json.loads(text))
    assert sum(math.prod(spec.shape) for spec in leaf_specs(config).values()) == count
    # Exact: write_config reads what it wrote, and refuses if that is another configuration.
    policies.get(config.model_type).write_config(config)


def test_deepseek_attention_scale():
    """As in DeepSeek's own code; cosine and sine stay as they are."""
    for name, all_dim in (("deepseek-ai/DeepSeek-V3", 1.0), ("deepseek-ai/DeepSeek-V2-Lite", 0.707)):
        config = read(json.loads(PUBLISHED[name][1]))
        expected = 192**-0.5 * (0.1 * all_dim * math.log(40) + 1) ** 2
        np.testing.assert_allclose(config.layer(0).scale, expected, rtol=1e-12)
        assert config.rope_scaling.attention_factor == 1.0


V3, LITE, PHI = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V2-Lite", "microsoft/Phi-3.5-MoE-instruct"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 differs from num_attention_heads=128"),
        (V3, {"q_lora_rank": ...}, "config field q_lora_rank is missing"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (V3, {"topk_group": 9}, "groups_per_token=9 must be from 1"),
        (
            V3,
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
            "quant_method=fp8: fmt='e5m2' is not read",
        ),
        (LITE, {"topk_method": "random"}, "topk_method='random' is not supported; 'greedy' and 'group_limited_greedy'"),
        (LITE, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (LITE, {"topk_method": "group_limited_greedy", "n_group": None}, "config field n_group is missing"),
        (PHI, {"rope_scaling": {"short_mscale": 1.0}}, "short_mscale=1.0 and long_mscale=1.24"),
        (PHI, {"num_experts_per_tok": 1}, "'sparsemixer' chooses 2 experts, not 1"),
        ("openai/gpt-oss-20b", {"swiglu_limit": 10.0}, "swiglu_limit=10.0 is not supported; only 7.0 is"),
        ("openai/gpt-oss-20b", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("Qwen/Qwen3-30B-A3B", {"num_local_experts": 64}, "num_experts=128 and num_local_experts=64 differ"),
        ("Qwen/Qwen3-30B-A3B", {"num_experts": None}, "config field num_experts is missing"),
        ("Qwen/Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ],
)
def test_configurations_that_are_refused(name, changes, message):
    raw = json.loads(PUBLISHED[name][1])
    for field, value in changes.items():
        raw[field] = raw[field] | value if isinstance(raw.get(field), dict) else value
        if value is ...:
            del raw[field]
    with pytest.raises(ConfigError, match=message):
        read(raw)
