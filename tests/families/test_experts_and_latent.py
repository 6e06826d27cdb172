"""Families with mixtures of experts, and those with latent attention."""

import numpy as np
import pytest
from family_harness import Case, check, make_model
from safetensors.numpy import load_file

import policies
from dsjax.params import flatten

QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 24}
QWEN2_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 7}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V3 = LATENT | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
DEEPSEEK_V2 = LATENT | {"num_experts_per_tok": 3, "hidden_size": 48}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
}
GRANITE_MOE = {
    "num_local_experts": 4,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
# transformers takes the short factors for texts of every length, so these stay within the original context.
PHIMOE_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 64,
}
GLM4_MOE = {
    "head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}

CASES = {
    "qwen3_moe": Case("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True}, generates=True),
    "qwen3_moe-dense-between": Case(
        "Qwen3Moe",
        QWEN3_MOE
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe-window": Case(
        "Qwen3Moe", QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 7, "num_experts_per_tok": 1}
    ),
    "gpt_oss": Case("GptOss", GPT_OSS, generates=True),
    "gpt_oss-full-attention-no-biases-plain-rope": Case(
        "GptOss",
        GPT_OSS
        | {
            "attention_bias": False,
            "layer_types": ["full_attention"] * 2,
            "num_experts_per_tok": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen2_moe": Case("Qwen2Moe", QWEN2_MOE, generates=True),
    "qwen2_moe-window-dense-between": Case(
        "Qwen2Moe",
        QWEN2_MOE
        | {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "deepseek_v3": Case("DeepseekV3", DEEPSEEK_V3, generates=True),
    "deepseek_v3-yarn-one-group": Case(
        "DeepseekV3",
        DEEPSEEK_V3
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek_v3-half-rotation": Case(
        "DeepseekV3",
        DEEPSEEK_V3
        | {
            "rope_interleave": False,
            "v_head_dim": 32,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "deepseek_v2": Case(
        "DeepseekV2",
        DEEPSEEK_V2 | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        generates=True,
    ),
    "deepseek_v2-groups-biases": Case(
        "DeepseekV2",
        DEEPSEEK_V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granitemoe": Case("GraniteMoe", GRANITE_MOE, generates=True),
    "granitemoe-biases-tied": Case(
        "GraniteMoe",
        GRANITE_MOE | {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    ),
    "phimoe": Case("Phimoe", {"num_local_experts": 6}, generates=True),
    "phimoe-biases-longrope-jitter": Case(
        "Phimoe",
        {
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
            "rope_parameters": PHIMOE_LONGROPE,
        },
    ),
    "olmoe": Case("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}, generates=True),
    "olmoe-biases-renormalized": Case(
        "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True, "norm_topk_prob": True}
    ),
    "glm4_moe": Case("Glm4Moe", GLM4_MOE, generates=True),
    "glm4_moe-norms-biases-groups": Case(
        "Glm4Moe",
        GLM4_MOE
        | {
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    check(CASES[case], tmp_path)


@pytest.mark.parametrize(
    "case",
    ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "granitemoe", "phimoe", "olmoe", "glm4_moe"],
)
def test_a_live_module_holds_what_its_file_holds(case, tmp_path):
    """The module's experts are one tensor where the file's are many."""
    model = make_model(CASES[case])
    model.save_pretrained(tmp_path)
    stored, (ours, theirs) = load_file(tmp_path / "model.safetensors"), map(policies.load, (model, tmp_path))
    assert (stored.keys() == model.state_dict().keys()) == (case == "gpt_oss")
    leaves = flatten(ours)
    assert ours.config == theirs.config and leaves.keys() == flatten(theirs).keys()
    for path, leaf in flatten(theirs).items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
