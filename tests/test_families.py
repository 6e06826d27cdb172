"""Random tiny models of every family against transformers on torch, float32, through a saved checkpoint."""

import numpy as np
import pytest
import torch
import transformers

import dsjax

# What all share; each case changes what it is about.
BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}

CASES = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa3-head64": ("Llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-gqa7-head16": (
        "Llama",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "llama-gqa8-head80": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 80}),
    "llama-head96-odd-vocabulary": ("Llama", {"head_dim": 96, "vocab_size": 1009}),
    "llama-head128": ("Llama", {"head_dim": 128, "num_attention_heads": 2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta-eps": ("Llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-2}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "smollm": (
        "Llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-window-biases": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-one-of-3-window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
}


def save_model(folder, name, changes, dtype=torch.float32, **options):
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{name}Config")(**{**BASE, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    with torch.no_grad():  # biases and norms are born zero and one, which would hide a mix-up
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path, rng):
    model = save_model(tmp_path, *CASES[case])
    tokens = rng.integers(0, model.config.vocab_size, (2, 60))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    params = dsjax.load(tmp_path)
    np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=1e-4)

    # The paged path, prompt in chunks: what it says is the arg-max of the same logits.
    out = dsjax.generate(
        dsjax.prepare(params), tokens[:1], max_new_tokens=6, page_size=16, token_budget=32, ignore_eos=True
    )
    text = np.concatenate([tokens[0], out.tokens[0, 0]])
    with torch.no_grad():
        logits = model(torch.tensor(text[None])).logits[0, 59:-1]
    np.testing.assert_array_equal(out.tokens[0, 0], logits.argmax(-1))
    logprobs = torch.log_softmax(logits, -1)[torch.arange(6), torch.tensor(np.array(out.tokens[0, 0])).long()]
    np.testing.assert_allclose(out.logprobs[0, 0], logprobs.numpy(), atol=1e-4)
