"""Gated feed-forward families beyond Llama: Gemma, Phi-3, Cohere, OLMo, Granite, GLM, the first Qwen and others."""

import json

import numpy as np
import pytest
import torch
import transformers
from family_harness import TOLERANCE, Case, check, check_generation, check_paged, make_model, torch_logits
from safetensors.numpy import load_file, save_file

import dsjax
import policies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}
LOCAL = {"rope_type": "default", "rope_theta": 1e3}
# Layers with a window of 7 tokens, and one without.
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA2 = WINDOWS | {"head_dim": 24, "query_pre_attn_scalar": 48}
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 1e4}
# Texts of up to 24 tokens are within the original context, longer ones not.
LONG_CONTEXT = {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
PARTIAL = {"short_factor": SHORT[:6], "long_factor": LONG[:6], "partial_rotary_factor": 0.75}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}

CASES = {
    "gemma": Case("Gemma", {"head_dim": 24, "tie_word_embeddings": True}, generates=True),
    "gemma-one-key-head-biases": Case(
        "Gemma", {"head_dim": 32, "num_key_value_heads": 1, "attention_bias": True, "hidden_act": "gelu"}
    ),
    "gemma2": Case("Gemma2", GEMMA2 | {"tie_word_embeddings": True}, generates=True),
    "gemma2-small-caps": Case("Gemma2", GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}),
    "gemma2-no-caps": Case("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": Case("Gemma3", GEMMA2 | {"tie_word_embeddings": True}, generates=True, config="Gemma3TextConfig"),
    "gemma3-linear-cap": Case(
        "Gemma3",
        GEMMA2
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}, "final_logit_softcapping": 1.0},
        config="Gemma3TextConfig",
    ),
    "phi3": Case("Phi3", {"num_key_value_heads": 4, "sliding_window": 9}, generates=True),
    "phi3-longrope": Case("Phi3", LONG_CONTEXT | {"rope_parameters": LONGROPE}),
    # Every prompt is longer than the original context, so that transformers does not change over midway.
    "phi3-longrope-scheduled": Case(
        "Phi3",
        {"max_position_embeddings": 96, "original_max_position_embeddings": 4, "rope_parameters": LONGROPE},
        scheduled=True,
    ),
    "phi4-mini-partial-longrope": Case(
        "Phi3", LONG_CONTEXT | {"rope_parameters": LONGROPE | PARTIAL, "tie_word_embeddings": True}
    ),
    "cohere": Case("Cohere", {"tie_word_embeddings": True}, generates=True),
    "cohere-head-norms-biases": Case("Cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": Case("Cohere2", WINDOWS | {"tie_word_embeddings": True}, generates=True),
    "cohere2-theta-biases": Case(
        "Cohere2",
        {
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_theta": 100.0,
        },
    ),
    "olmo": Case("Olmo", {"num_key_value_heads": 4}, generates=True),
    "olmo-clip-tied-biases": Case("Olmo", {"clip_qkv": 0.3, "tie_word_embeddings": True, "attention_bias": True}),
    "olmo2": Case("Olmo2", {"num_key_value_heads": 4}, generates=True),
    "olmo2-gqa-biases": Case("Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-2, "rope_theta": 5e5}),
    "olmo3": Case("Olmo3", WINDOWS, generates=True),
    "olmo3-yarn": Case("Olmo3", WINDOWS | {"rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL}}),
    "granite": Case("Granite", MULTIPLIERS | {"tie_word_embeddings": True}, generates=True),
    "granite-biases": Case("Granite", {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.3}),
    "smollm3": Case("SmolLM3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}, generates=True),
    "smollm3-window-biases": Case(
        "SmolLM3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm3-yarn": Case("SmolLM3", {"no_rope_layers": [1, 0], "rope_parameters": YARN}),
    "glm": Case("Glm", {"head_dim": 16}, generates=True),
    "glm-no-biases-partial": Case(
        "Glm",
        {
            "head_dim": 24,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
    "glm4": Case("Glm4", {"head_dim": 16}, generates=True),
    "glm4-no-biases-tied": Case("Glm4", {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
    "exaone4": Case("Exaone4", WINDOWS, generates=True),
    "exaone4-no-window-tied": Case(
        "Exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
        },
    ),
    "ministral": Case("Ministral", WINDOWS | {"head_dim": 24}, generates=True),
    "starcoder2": Case("Starcoder2", {"tie_word_embeddings": True, "sliding_window": 9}, generates=True),
    "starcoder2-no-biases": Case("Starcoder2", {"use_bias": False, "hidden_act": "gelu", "norm_epsilon": 1e-2}),
    "stablelm": Case("StableLm", {"num_key_value_heads": 4, "use_qkv_bias": True}, generates=True),
    "stablelm-12b-half": Case(
        "StableLm",
        {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "helium-biases": Case("Helium", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "seed-oss-biases": Case("SeedOss", {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}),
    "arcee-biases": Case("Arcee", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    check(CASES[case], tmp_path)


# What a config.json of an older release holds at least, and what some of its fields were.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD_FILES = {
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 3, "rope_local_base_freq": 50.0, "rope_theta": 5e5},
    "phi3": {"original_max_position_embeddings": 64, "rope_scaling": LONGROPE | {"factor": None}},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window_pattern": 2, "rope_theta": 5e4},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"rope_scaling": YARN},
    "granite": {},
    "smollm3": {},
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.25},
    "exaone4": {"sliding_window": None, "sliding_window_pattern": "LLLG", "layer_types": ["full_attention"] * 9},
    "ministral": {},
    "starcoder2": {},
    "stablelm": {"qk_layernorm": True},
    "helium": {},
    "seed_oss": {},
    "arcee": {},
}


@pytest.mark.parametrize("fields", [{}, None], ids=["least", "old"])
@pytest.mark.parametrize("family", OLD_FILES)
def test_absent_and_old_fields_mean_what_they_mean_to_transformers(family, fields):
    """transformers fills in what a file lacks and writes it all in its newest spelling; both must read alike."""
    raw = {**SMALL, **(OLD_FILES[family] if fields is None else fields), "model_type": family}
    whole = json.loads(transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))).to_json_string())
    policy = policies.get(family)
    assert policy.read_config(raw) == policy.read_config(whole)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma", "hidden_activation", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("phi3", "lm_head_bias", True),
        ("cohere2", "use_parallel_block", False),
        ("qwen", "no_bias", False),
        ("internlm", "rotary", {"type": "linear"}),
        ("smollm3", "no_rope_layers", [1]),
    ],
)
def test_unsupported_mathematics_is_an_error_that_names_the_field(family, field, value):
    raw = {field: value, "model_type": family, **SMALL}
    with pytest.raises(dsjax.errors.ConfigError, match=field):
        policies.get(family).read_config(raw)


def _qwen(config, tensors):
    names = {"lm_head.weight": "lm_head.weight"}
    names |= {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight"}
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{old}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            tensors[f"{old}.self_attn.qkv.{kind}"] = np.concatenate(parts)
            names[f"{old}.self_attn.qkv.{kind}"] = f"{new}.attn.c_attn.{kind}"
        names[f"{old}.self_attn.o_proj.weight"] = f"{new}.attn.c_proj.weight"
        names[f"{old}.mlp.up_proj.weight"] = f"{new}.mlp.w1.weight"
        names[f"{old}.mlp.gate_proj.weight"] = f"{new}.mlp.w2.weight"
        names[f"{old}.mlp.down_proj.weight"] = f"{new}.mlp.c_proj.weight"
        names[f"{old}.input_layernorm.weight"] = f"{new}.ln_1.weight"
        names[f"{old}.post_attention_layernorm.weight"] = f"{new}.ln_2.weight"
    fields = {
        "attn_dropout_prob": 0.0,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "initializer_range": 0.02,
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": 4 * config.max_position_embeddings,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": config.max_position_embeddings,
        "tokenizer_class": "QWenTokenizer",
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
    }
    return fields, {names[name]: tensor for name, tensor in tensors.items()}


def _internlm(config, tensors):
    fields = {
        "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
        "bias": True,
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "internlm",
        "rms_norm_eps": config.rms_norm_eps,
        "rotary": {"base": 10000, "type": "dynamic"},
    }
    return fields, tensors


def _internlm2(config, tensors):
    names = {"model.embed_tokens": "model.tok_embeddings", "model.norm": "model.norm", "lm_head": "output"}
    groups = (config.num_key_value_heads, -1, config.head_dim, config.hidden_size)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        heads = [tensors.pop(f"{layer}.self_attn.{part}_proj.weight").reshape(groups) for part in "qkv"]
        tensors[f"{layer}.qkv.weight"] = np.concatenate(heads, axis=1).reshape(-1, config.hidden_size)
        names[f"{layer}.qkv"] = f"{layer}.attention.wqkv"
        names[f"{layer}.self_attn.o_proj"] = f"{layer}.attention.wo"
        for old, new in {"gate": "w1", "down": "w2", "up": "w3"}.items():
            names[f"{layer}.mlp.{old}_proj"] = f"{layer}.feed_forward.{new}"
        names[f"{layer}.input_layernorm"] = f"{layer}.attention_norm"
        names[f"{layer}.post_attention_layernorm"] = f"{layer}.ffn_norm"
    fields = {
        "attn_implementation": "eager",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "internlm2",
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 10000,
    }
    renamed = {f"{names[name.removesuffix('.weight')]}.weight": tensor for name, tensor in tensors.items()}
    return fields, renamed


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# Families whose code is published beside their weights, not in transformers, by the class that computes the same.
EQUIVALENTS = {
    "qwen": (Case("Qwen2", {"num_key_value_heads": 4, "use_sliding_window": False}), _qwen),
    "internlm": (Case("Llama", {"num_key_value_heads": 4, "attention_bias": True}), _internlm),
    # Texts of up to 32 tokens are within its context, longer ones not.
    "internlm2": (Case("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}), _internlm2),
}


@pytest.mark.parametrize("family", EQUIVALENTS)
def test_equals_the_equivalent_class_of_transformers(family, tmp_path):
    """transformers has no class for these; an equivalent one's tensors are put under their names and in their layout.

    InternLM is Llama with biases on q, k, v and the output; the first Qwen is Qwen2 with as many key as query heads;
    InternLM2 is Llama. Their dynamic scaling of rotary frequencies is Llama's, and is not reached in the others.
    """
    case, convert = EQUIVALENTS[family]
    model = make_model(case)
    fields, tensors = convert(model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    fields |= {name: getattr(model.config, name) for name in (*same, "bos_token_id", "eos_token_id")}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")

    params = dsjax.load(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, (2, 40))
    np.testing.assert_allclose(dsjax.logits(params, tokens), torch_logits(model, tokens), atol=TOLERANCE)
    check_paged(params, model, rng)
    if family != "internlm2":  # transformers rescales while it generates
        check_generation(params, model, rng)

    policies.export_hf(params, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)
    again = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    assert policies.get(family).read_config(again) == params.config


def test_the_text_model_of_a_gemma3_that_sees(tmp_path):
    """Checkpoints of 4B and larger hold a vision tower too; `tower="text"` leaves it out."""
    text = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "sliding_window": 7}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text | {"pad_token_id": None},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 200, (2, 30))
    expected = torch_logits(model, tokens)
    for source in (tmp_path, model):
        params = dsjax.load(source, tower="text")
        np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=TOLERANCE)
    with pytest.raises(dsjax.ConfigError, match="tower=None: a gemma3 checkpoint has the towers 'text'"):
        dsjax.load(tmp_path)
