"""GPT-2 and the families that came of it: LayerNorm, plain feed-forward layers, fused projections, ALiBi."""

import pytest
from family_harness import Case, check

# Fields of `BASE` that these configs do not have.
GPT = {"intermediate_size": ..., "num_key_value_heads": ..., "tie_word_embeddings": True}
ALIBI = {**GPT, "max_position_embeddings": ...}
NEOX = {"num_key_value_heads": ..., "layer_norm_eps": 1e-3}
OPT = {**GPT, "ffn_dim": 96}

CASES = {
    "gpt2": Case("GPT2", GPT, generates=True),
    "gpt2-inverse-layer-scale": Case(
        "GPT2",
        {
            **GPT,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "n_inner": 80,
            "layer_norm_epsilon": 1e-2,
        },
    ),
    "gpt2-unscaled-untied-relu": Case(
        "GPT2",
        {
            **GPT,
            "scale_attn_weights": False,
            "activation_function": "relu",
            "hidden_size": 24,
            "tie_word_embeddings": False,
        },
    ),
    "opt": Case("OPT", OPT, generates=True),
    "opt-350m": Case("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}, generates=True),
    "opt-no-biases-no-norm-weights": Case(
        "OPT",
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt-no-final-norm-untied": Case(
        "OPT", {**OPT, "_remove_final_layer_norm": True, "word_embed_proj_dim": 24, "tie_word_embeddings": False}
    ),
    "biogpt": Case("BioGpt", {"num_key_value_heads": ..., "tie_word_embeddings": True}, generates=True),
    "biogpt-unscaled-untied": Case("BioGpt", {"num_key_value_heads": ..., "scale_embedding": False}),
    "falcon-7b": Case("Falcon", {**GPT, "num_attention_heads": 8}, generates=True),
    "falcon-40b": Case("Falcon", {**GPT, "new_decoder_architecture": True, "num_kv_heads": 2}, generates=True),
    "falcon-11b": Case(
        "Falcon",
        {
            **GPT,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 80,
            "layer_norm_epsilon": 1e-2,
            "rope_theta": 500042.0,
            "tie_word_embeddings": False,
        },
    ),
    # transformers rounds slopes, and their products with positions, to bfloat16; with 4 heads and up to 256 positions
    # that changes nothing. Its eager attention adds them twice, so this is its default one.
    "falcon-rw": Case(
        "Falcon",
        {**GPT, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        generates=True,
        attention="sdpa",
    ),
    "falcon-multi-head-parallel": Case("Falcon", {**GPT, "multi_query": False, "bias": True}),
    "gpt_neox": Case("GPTNeoX", NEOX, generates=True),
    "gpt_neox-sequential": Case(
        "GPTNeoX",
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": 500.0,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox-rope-linear": Case("GPTNeoX", {**NEOX, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "gptj": Case("GPTJ", {**GPT, "rotary_dim": 8, "tie_word_embeddings": False}, generates=True),
    "gptj-whole-heads-tied": Case(
        "GPTJ", {**GPT, "rotary_dim": 16, "n_inner": 80, "layer_norm_epsilon": 1e-2, "activation_function": "gelu"}
    ),
    "phi": Case("Phi", {"num_key_value_heads": 4}, generates=True),
    "phi-gqa-qk-norm": Case(
        "Phi", {"qk_layernorm": True, "layer_norm_eps": 1e-2, "partial_rotary_factor": 0.25, "hidden_act": "gelu"}
    ),
    "phi-rope-dynamic": Case(
        "Phi",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.5},
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "bloom": Case("Bloom", ALIBI, generates=True),
    "bloom-6-heads": Case(
        "Bloom",
        {
            **ALIBI,
            "num_attention_heads": 6,
            "hidden_size": 48,
            "layer_norm_epsilon": 1e-2,
            "tie_word_embeddings": False,
        },
    ),
    "mpt": Case("Mpt", {**ALIBI, "max_seq_len": 256}, generates=True),
    "mpt-6-heads-clipped": Case(
        "Mpt",
        {
            **ALIBI,
            "num_attention_heads": 6,
            "hidden_size": 48,
            "max_seq_len": 256,
            "layer_norm_epsilon": 1e-2,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.7},
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neo": Case("GPTNeo", {**GPT, "attention_types": [[["global", "local"], 1]], "window_size": 5}, generates=True),
    "gpt_neo-uneven": Case(
        "GPTNeo",
        {
            **GPT,
            "num_hidden_layers": 3,
            "attention_types": [[["local"], 2], [["global"], 1]],
            "window_size": 9,
            "intermediate_size": 80,
            "layer_norm_epsilon": 1e-2,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_bigcode": Case("GPTBigCode", GPT, generates=True),
    "gpt_bigcode-multi-head": Case(
        "GPTBigCode",
        {**GPT, "multi_query": False, "n_inner": 80, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
    ),
    "codegen": Case("CodeGen", {**GPT, "rotary_dim": 8, "tie_word_embeddings": False}, generates=True),
    "codegen-8-heads": Case(
        "CodeGen",
        {**GPT, "num_attention_heads": 8, "rotary_dim": 4, "n_inner": 80, "layer_norm_epsilon": 1e-2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    check(CASES[case], tmp_path)
