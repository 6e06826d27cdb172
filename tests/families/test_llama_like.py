"""Llama and the families nearest to it."""

import pytest
from family_harness import Case, check

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
# Texts of up to 32 tokens are within its context, longer ones not.
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}

CASES = {
    "llama": Case("Llama", scheduled=True),
    "llama-mha-tied": Case("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa3-head64": Case("Llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-gqa7-head16": Case(
        "Llama", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 16}
    ),
    "llama-gqa8-head80": Case("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 80}),
    "llama-head96-odd-vocabulary": Case("Llama", {"head_dim": 96, "vocab_size": 1009}),
    "llama-head128": Case("Llama", {"head_dim": 128, "num_attention_heads": 2}),
    "llama-biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta-eps": Case("Llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-2}),
    "llama-rope-llama3": Case("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": Case("Llama", {"rope_parameters": LINEAR}),
    "llama-rope-yarn": Case("Llama", {"rope_parameters": YARN}),
    "llama-rope-yarn-whole": Case(
        "Llama", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 4.0, "attention_factor": 1.2}}
    ),
    "llama-rope-dynamic": Case("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "llama-gelu": Case("Llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": Case("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "smollm": Case(
        "Llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "tie_word_embeddings": True},
    ),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral-window": Case("Mistral", {"sliding_window": 7, "head_dim": 24}, generates=True),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True}, generates=True),
    "qwen2-window": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Case("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, generates=True),
    "qwen3-window-biases": Case(
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "mixtral": Case("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, generates=True),
    "mixtral-one-of-3-window": Case("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    check(CASES[case], tmp_path)
