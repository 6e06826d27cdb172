import dataclasses
import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from dsjax.config import Experts, ModelConfig, RopeScaling
from dsjax.errors import ConfigError

# config.json of real checkpoints, as published.
LLAMA_3_1 = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
  "vocab_size": 128256}"""
MISTRAL_7B = """{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
MISTRAL_NEMO = """{
  "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 1024000, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": true,
  "vocab_size": 131072}"""
QWEN_2_5 = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
  "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN_3 = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}"""
MIXTRAL_8X7B = """{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
  "vocab_size": 32000}"""
SMOLLM2 = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
  "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
  "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
  "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}"""


def read(raw) -> ModelConfig:
    raw = json.loads(raw) if isinstance(raw, str) else raw
    return policies.get(raw["model_type"]).read_config(raw)


def base(model_type="llama", **fields):
    sizes = dict(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6)
    sizes |= dict(head_dim=8) if model_type == "qwen3" else {}
    sizes |= dict(num_local_experts=4, num_experts_per_tok=2) if model_type == "mixtral" else {}
    return {"model_type": model_type} | sizes | fields


def test_llama_3_1():
    assert read(LLAMA_3_1) == ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_context=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_mistral_7b():
    config = read(MISTRAL_7B)
    assert config.windows == (4096,) * 32
    assert (config.head_dim, config.num_kv_heads, config.eos_ids) == (128, 8, (2,))


def test_mistral_nemo():
    config = read(MISTRAL_NEMO)
    assert config.windows == () and config.head_dim == 128 and config.num_heads * config.head_dim != config.hidden_size


def test_qwen_2_5():
    config = read(QWEN_2_5)
    assert config.attention_bias and not config.attention_out_bias and not config.mlp_bias
    assert config.tie_embeddings and config.windows == () and config.rope_theta == 1e6


def test_qwen_3():
    config = read(QWEN_3)
    assert config.qk_norm and not config.attention_bias and config.tie_embeddings and config.windows == ()
    assert config.head_dim == 128 and config.num_heads * config.head_dim != config.hidden_size


def test_mixtral_8x7b():
    config = read(MIXTRAL_8X7B)
    assert config.experts == Experts(count=8, per_token=2, size=14336) and config.intermediate_size == 14336
    assert config.rope_theta == 1e6 and config.windows == ()


def test_smollm2():
    config = read(SMOLLM2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_embeddings and config.rope_scaling is None and config.rope_theta == 100000.0


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("llama", {"attention_bias": True}, {"attention_bias": True, "attention_out_bias": True}),
        ("llama", {"mlp_bias": True, "tie_word_embeddings": True}, {"mlp_bias": True, "tie_embeddings": True}),
        ("llama", {"head_dim": 10, "eos_token_id": [3, 4]}, {"head_dim": 10, "eos_ids": (3, 4)}),
        ("llama", {"rope_parameters": LINEAR}, {"rope_theta": 300.0, "rope_scaling": RopeScaling("linear", 2.0)}),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
            {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)},
        ),
        # Without it, transformers takes the current context for the original one.
        ("llama", {"rope_parameters": LLAMA3}, {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)}),
        ("llama", {"hidden_act": "gelu"}, {"activation": "gelu"}),
        ("llama", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ("llama", {"hidden_act": "relu", "pretraining_tp": 2, "attention_dropout": 0.5}, {"activation": "relu"}),
        ("mistral", {}, {"windows": (4096,) * 3}),
        ("mistral", {"sliding_window": 7}, {"windows": (7,) * 3}),
        ("mistral", {"sliding_window": None}, {"windows": ()}),
        ("qwen2", {}, {"windows": ()}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {"windows": (None, None, 5)},
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            {"windows": (5, None, 5)},
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, {"windows": ()}),
        ("qwen3", {}, {"qk_norm": "head"}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "attention_bias": True},
            {"windows": (None, None, 5), "qk_norm": "head", "attention_bias": True, "attention_out_bias": True},
        ),
        ("mixtral", {}, {"experts": Experts(4, 2, 8), "rope_theta": 1e6}),
        (
            "mixtral",
            {"sliding_window": 7, "rope_parameters": LINEAR},
            {"experts": Experts(4, 2, 8), "windows": (7,) * 3, "rope_theta": 300.0}
            | {"rope_scaling": RopeScaling("linear", 2.0)},
        ),
    ],
)
def test_what_transformers_writes(tmp_path, family, fields, expected):
    cls = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "mixtral": transformers.MixtralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[family]
    cls(**base(family, **fields)).save_pretrained(tmp_path)
    config = read((tmp_path / "config.json").read_text())
    defaults = dict(num_kv_heads=2, head_dim=8, rope_theta=10000.0, rope_scaling=None, activation="silu", windows=())
    defaults |= dict(qk_norm=None, experts=None)
    defaults |= dict(attention_bias=family == "qwen2", attention_out_bias=False, mlp_bias=False, tie_embeddings=False)
    for name, value in (defaults | expected).items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("config_class", "more"),
    [
        (transformers.MistralConfig, {}),
        (transformers.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_a_window_is_what_transformers_masks(config_class, more):
    import torch
    from transformers.masking_utils import create_sliding_window_causal_mask

    hf = config_class(**base(config_class.model_type, sliding_window=3, attn_implementation="eager", **more))
    mask = create_sliding_window_causal_mask(
        hf, inputs_embeds=torch.zeros(1, 6, 32), attention_mask=None, past_key_values=None
    )
    seen = (mask[0, 0] == 0).sum(-1).tolist()
    window = read(json.loads(hf.to_json_string())).window(0)
    assert seen == [min(i + 1, window) for i in range(6)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True is unknown"),
        ({"logit_scale": 0.5}, r"logit_scale=0\.5 is unknown"),
        ({"sliding_window": 16}, "sliding_window=16 is unknown to the llama policy"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, r"rope_scaling\.type=ntk is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is missing"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1] * 4}}, "has 1 factors"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, r"rope_scaling\.beta_fast=3"),
        ({"rope_scaling": {"type": "default", "factor": 2}}, r"rope_scaling\.factor=2"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor=0\.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"rope_parameters\.full_attention="),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "both given and differ"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported; these are: silu"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' should be of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True should be of type int"),
        ({"attention_bias": 1}, "attention_bias=1 should be of type bool"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide hidden_size=32"),
        ({"num_key_value_heads": 3}, "num_key_value|num_kv_heads=3 does not divide"),
        ({"head_dim": 7}, "7 of head_dim=7 are rotated; rotary embedding needs pairs"),
        ({"eos_token_id": "</s>"}, "token ids must be non-negative integers, got '</s>'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method=aqlm is not supported; these are: gptq,"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding window must be at least 1"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope=True is not supported"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, "layer_types has 'linear_attention'"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ({"model_type": "qwen3", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim is missing"),
        ({"model_type": "qwen3", "head_dim": 8, "layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ({"model_type": "qwen3", "head_dim": 8, "num_experts": 4}, "num_experts=4 is unknown to the qwen3 policy"),
        ({"model_type": "mixtral", "num_local_experts": None}, "num_local_experts is missing"),
        ({"model_type": "mixtral", "num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 5},
            r"experts\.per_token=5 must be from 1 to experts\.count=4",
        ),
        ({"model_type": "mixtral", "mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"model_type": "mixtral", "norm_topk_prob": False}, "norm_topk_prob=False is unknown to the mixtral policy"),
    ],
)
def test_unsupported_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        read(base(**fields))


@pytest.mark.parametrize(
    ("first", "switched_on", "windows"),
    [(2, True, (None, None, 5)), (0, True, (5, 5, 5)), (None, True, ()), (0, False, ())],
)
def test_windows_of_older_qwen2_files(first, switched_on, windows):
    raw = base("qwen2", use_sliding_window=switched_on, sliding_window=5, max_window_layers=first)
    raw = {name: value for name, value in raw.items() if value is not None}
    assert read(raw).windows == windows
    theirs = transformers.Qwen2Config(**raw)
    window = theirs.sliding_window
    assert [window if kind == "sliding_attention" else None for kind in theirs.layer_types] == list(
        windows or [None] * 3
    )


def test_null_fields_mean_not_used():
    assert read(base(logit_scale=None, quantization_config=None)) == read(base())


scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just("linear"), st.floats(1, 9)),
    st.builds(RopeScaling, st.just("dynamic"), st.integers(2, 9), original_context=st.just(16)),
    st.builds(RopeScaling, st.just("llama3"), st.floats(1, 9), st.just(1.0), st.floats(2, 9), st.integers(1, 99)),
    st.builds(
        RopeScaling,
        st.just("yarn"),
        st.floats(1, 9),
        original_context=st.integers(1, 99),
        beta_fast=st.floats(8, 32),
        beta_slow=st.floats(1, 4),
        truncate=st.booleans(),
        attention_factor=st.floats(1, 2),
    ),
)


@st.composite
def family_configs(draw):
    family, layers = draw(st.sampled_from(["llama", "mistral", "mixtral", "qwen2", "qwen3"])), draw(st.integers(1, 4))
    bias = draw(st.booleans()) if family in ("llama", "qwen3") else False
    size, experts = draw(st.integers(1, 99)), None
    if family == "mixtral":
        count = draw(st.integers(1, 9))
        experts = Experts(count, draw(st.integers(1, count)), size)
    windows, scaling = (), draw(scalings)
    if family in ("mistral", "mixtral") and draw(st.booleans()):
        windows = (draw(st.integers(1, 99)),) * layers
    if family in ("qwen2", "qwen3") and any(where := draw(st.lists(st.booleans(), min_size=layers, max_size=layers))):
        windows = tuple(9 if here else None for here in where)
    return ModelConfig(
        model_type=family,
        vocab_size=draw(st.integers(1, 99)),
        hidden_size=4 * draw(st.integers(1, 9)),
        intermediate_size=size,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=2 * draw(st.integers(1, 9)),
        max_context=round(16 * scaling.factor) if scaling and scaling.kind == "dynamic" else draw(st.integers(1, 99)),
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope_theta=draw(st.floats(1, 1e7)),
        rope_scaling=scaling,
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        mlp_bias=draw(st.booleans()) if family == "llama" else False,
        qk_norm="head" if family == "qwen3" else None,
        tie_embeddings=draw(st.booleans()),
        windows=windows,
        experts=experts,
        bos_id=draw(st.one_of(st.none(), st.integers(0, 9))),
        eos_ids=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
    )


@settings(max_examples=60, deadline=None)
@given(config=family_configs())
def test_configs_write_back(config):
    raw = policies.get(config.model_type).write_config(config)
    assert read(json.loads(json.dumps(raw))) == config


@pytest.mark.parametrize("raw", [LLAMA_3_1, MISTRAL_7B, MIXTRAL_8X7B, QWEN_2_5, QWEN_3, SMOLLM2])
def test_transformers_reads_what_is_written(raw):
    config = read(raw)
    written = policies.get(config.model_type).write_config(config)
    written.pop("architectures")
    theirs = transformers.AutoConfig.for_model(**written)
    assert read(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"windows": (8, None, 8)}, "windows=.* has no spelling in a llama config.json"),
        ("llama", {"attention_bias": True}, "attention_out_bias=False has no spelling"),
        ("mistral", {"windows": (8, None, 8)}, "windows"),
        ("mistral", {"mlp_bias": True}, "mlp_bias=True has no spelling in a mistral"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("qwen2", {"windows": (8, 9, 8)}, "windows"),
        ("qwen3", {"windows": (8, 9, 8)}, "windows=.* has no spelling in a qwen3"),
        ("qwen3", {"qk_norm": None}, "qk_norm=None has no spelling in a qwen3"),
        (
            "mixtral",
            {"experts": None},
            "no spelling in a mixtral config.json: config field num_local_experts is missing",
        ),
        ("mixtral", {"experts": Experts(4, 2, 8, renormalize=False)}, r"experts=Experts\(.*no spelling in a mixtral"),
        ("mixtral", {"qk_norm": "head"}, "qk_norm='head' has no spelling in a mixtral"),
        ("llama", {"qk_norm": "head"}, "qk_norm='head' has no spelling in a llama"),
        ("llama", {"norm": "layer"}, "norm='layer' has no spelling in a llama"),
        ("qwen3", {"experts": Experts(4, 2, 8)}, "experts=Experts.* has no spelling in a qwen3"),
        ("llama", {"rope_scaling": RopeScaling("factors", factors=(1.0,) * 4)}, "'factors'"),
    ],
)
def test_what_a_family_can_not_express(family, changes, message):
    config = dataclasses.replace(read(base(family)), **changes)
    with pytest.raises(ConfigError, match=message):
        policies.get(family).write_config(config)
