"""GGUF files of every architecture, against the transformers model that they were made from.

A file is written here as llama.cpp's converter does it: names of tensors and keys are those of its `gguf` package, and
what the converter does to tensors is stated by each function. Activations: llama.cpp runs every GELU in its tanh form;
here it is that of the Hugging Face family.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_harness import TOLERANCE, Case, make_model, torch_logits
from gguf import MODEL_ARCH as ARCH
from gguf import MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from gguf import GGMLQuantizationType as Kind

import dsjax
import policies
from dsjax.params import flatten
from dsjax.quantization import QuantizedArray

# What a converter makes of one tensor: pairs of a Hugging Face name, which the package's table knows, and an array.
Convert = Callable[[str, np.ndarray, Any], Iterator[tuple[str, np.ndarray]]]
Keys = Callable[[GGUFWriter, Any], None]


def as_they_are(name, tensor, config):
    yield name, tensor


def permute_rotary(name, tensor, config):
    """The halves of each head of q and k become neighbours."""
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if f"{part}_proj." in name:
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    yield name, tensor


def add_one(name, tensor, config):
    """Scales of norms are stored around 1."""
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def transpose(name, tensor, config):
    """GPT-2's projections become `[out, in]`."""
    yield name, tensor.T if re.search(r"c_(attn|proj|fc)\.weight", name) else tensor


def regroup(name, tensor, config):
    """Groups of a key head's queries, its key and its value become all queries, keys, values."""
    if "query_key_value" in name:
        heads = config.num_attention_heads
        groups = getattr(config, "num_kv_heads", heads) if getattr(config, "new_decoder_architecture", True) else 1
        head = tensor.reshape(groups, heads // groups + 2, config.hidden_size // heads, *tensor.shape[1:])
        parts = (head[:, :-2], head[:, -2], head[:, -1])
        tensor = np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    yield name, tensor


def bloom(name, tensor, config):
    """As `regroup`; the package knows the names without their prefix."""
    yield from regroup(name.removeprefix("transformer."), tensor, config)


def split_experts(name, tensor, config):
    """Gate and up apart; transformers' module has them as one, its files and the converter do not."""
    if name.endswith("experts.gate_up_proj"):
        for part, rows in zip(("gate", "up"), np.split(tensor, 2, axis=-2), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), rows
    else:
        yield name + ".weight" if name.endswith("experts.down_proj") else name, tensor


def mixtral(name, tensor, config):
    """As Llama and other experts."""
    for new, part in split_experts(name, tensor, config):
        yield from permute_rotary(new, part, config)


def squeeze_gate(name, tensor, config):
    """The gate of the shared expert becomes a vector; newer converters leave it `[1, D]`."""
    for new, part in split_experts(name, tensor, config):
        yield new, part[0] if new.endswith("0.mlp.shared_expert_gate.weight") else part


def gpt_oss(name, tensor, config):
    """Rows of gate and up no longer alternate, and weights become `[out, in]`."""
    if name.endswith("sinks"):
        yield f"{name}.weight", tensor
        return
    kind = "bias" if name.endswith("_bias") else "weight"
    name = name.removesuffix("_bias")
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        tensor = tensor if kind == "bias" else tensor.swapaxes(1, 2)
        if name.endswith("down_proj"):
            yield f"{name}.{kind}", tensor
            return
        for i, part in enumerate(("gate", "up")):
            rows = tensor[:, i::2]
            yield name.replace("gate_up_proj", f"{part}_proj.{kind}"), rows
    else:
        yield name, tensor


def fuse_qkv(name, tensor, config):
    """The first files of Phi-2 have one tensor for q, k and v: renamed here, joined by `tensors_of`."""
    yield re.sub(r"self_attn\.([qkv])_proj", r"self_attn.query_key_value-\1", name), tensor


def per_expert(name, tensor, config):
    """The first files of Mixtral have a tensor for each expert, under a name that the package has forgotten."""
    for new, part in mixtral(name, tensor, config):
        if found := re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(gate|up|down)_proj", new):
            for expert, weight in enumerate(part):
                yield f"blk.{found[1]}.ffn_{found[2]}.{expert}.weight", weight
        else:
            yield new, part


def split_latent(name, tensor, config):
    """Keys and values apart, by heads, and keys turned; older files have one tensor, as Hugging Face has."""
    if "kv_b_proj" in name:
        heads = tensor.reshape(config.num_attention_heads, -1, tensor.shape[-1])
        keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), values
    else:
        yield from split_experts(name.replace("correction_bias", "correction.bias"), tensor, config)


def head_norms(name, tensor, config):
    """The norms of StableLM's heads become one tensor: renamed here, stacked by `tensors_of`."""
    yield re.sub(r"_layernorm\.norms\.(\d+)\.weight", r"_layernorm.weight-\1", name), tensor


def tensors_of(model, arch, convert) -> dict[str, np.ndarray]:
    """All tensors of a file."""
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors, parts = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for new, array in convert(name, tensor.float().numpy(), model.config):
            key, _, part = re.sub(r"-(\w)(\.\w+)?$", r"\2-\1", new).partition("-")
            if not key.startswith("blk."):
                key = names.get_name(key, try_suffixes=(".weight", ".bias"))
                assert key is not None, f"the package does not know {new}"
            if part:
                parts.setdefault(key, []).append(array)
            else:
                assert key not in tensors
                tensors[key] = np.ascontiguousarray(array)
    joined = {key: (np.stack if "norm" in key else np.concatenate)(arrays) for key, arrays in parts.items()}
    return tensors | joined


# Families whose class computes the field, or means something else by it.
NO_HEAD_DIM = ("bloom", "falcon", "deepseek_v2", "deepseek_v3")


def nothing(writer, config):
    pass


def usual_keys(writer: GGUFWriter, config: Any) -> None:
    """What converters write of every model, under the names that its config has."""

    def first(*names):
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    hidden = config.hidden_size
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(first("max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(first("intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden)
    writer.add_head_count(heads)
    # Converters of families without the field leave the key out.
    if (kv_heads := first("num_key_value_heads")) is not None:
        writer.add_head_count_kv(kv_heads)
    if (epsilon := first("rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    elif (epsilon := first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")) is not None:
        writer.add_layer_norm_eps(epsilon)
    if (head_dim := getattr(config, "head_dim", None)) is not None and config.model_type not in NO_HEAD_DIM:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (experts := first("num_local_experts", "num_experts")) is not None and "deepseek" not in config.model_type:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def part_rotary(writer, config):
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head * config.rope_parameters["partial_rotary_factor"]))


def neox(writer, config):
    part_rotary(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


def stablelm(writer, config):
    part_rotary(writer, config)
    # Some converters wrote this of sequential models too.
    writer.add_parallel_residual(True)


def falcon(writer, config):
    writer.add_tensor_data_layout("jploski")
    writer.add_head_count_kv(config.num_kv_heads if config.new_decoder_architecture else 1)


def mpt(writer, config):
    writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    writer.add_clamp_kqv(config.attn_config.clip_qkv)


def gemma2(writer, config):
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def window(writer, config):
    writer.add_sliding_window(config.sliding_window or 0)


def listed_windows(writer, config):
    window(writer, config)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def phi3(writer, config):
    window(writer, config)
    part_rotary(writer, config)
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors((1 + np.log(stretch) / np.log(original)) ** 0.5)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.float32(rope[f"{length}_factor"]))


def experts(writer, config):
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def granite(writer, config):
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def cohere(writer, config):
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    if config.model_type == "cohere2":
        window(writer, config)


def oss(writer, config):
    window(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def latent(writer, config):
    key, rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank
    if config.model_type == "deepseek_v3":  # as newer files say it
        writer.add_head_count_kv(1)
        writer.add_key_length(rank + config.qk_rope_head_dim)
        writer.add_value_length(rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config.v_head_dim)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        writer.add_q_lora_rank(config.q_lora_rank)
    else:
        writer.add_key_length(key)
        writer.add_value_length(config.v_head_dim)
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A model and how its file is written; `differs` names fields that a file does not hold as config.json does."""

    arch: ARCH
    case: Case
    convert: Convert = as_they_are
    keys: Keys = nothing
    differs: tuple[str, ...] = ()


GPT = {"intermediate_size": ..., "num_key_value_heads": ..., "tie_word_embeddings": True}
TIED = {"tie_word_embeddings": True}
FULL, LOCAL = "full_attention", "sliding_attention"
WINDOWS = {"sliding_window": 9, "num_hidden_layers": 4, "layer_types": [LOCAL, LOCAL, LOCAL, FULL]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MPT = GPT | {"num_attention_heads": 6, "hidden_size": 48, "max_position_embeddings": ..., "max_seq_len": 64}
MPT["attn_config"] = {"clip_qkv": 0.3}
GEMMA2 = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 9, "layer_types": [LOCAL, FULL]} | TIED
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
}

CASES = {
    "mixtral": Gguf(ARCH.LLAMA, Case("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}), mixtral),
    "mixtral-per-expert": Gguf(ARCH.LLAMA, Case("Mixtral", {"num_local_experts": 3}), per_expert),
    "llama-yarn": Gguf(ARCH.LLAMA, Case("Llama", {"rope_parameters": YARN}), permute_rotary),
    "qwen2moe": Gguf(
        ARCH.QWEN2MOE, Case("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 48}), squeeze_gate, experts
    ),
    "qwen3moe": Gguf(
        ARCH.QWEN3MOE, Case("Qwen3Moe", MOE | {"head_dim": 24, "norm_topk_prob": True}), split_experts, experts
    ),
    "gemma": Gguf(ARCH.GEMMA, Case("Gemma", {"head_dim": 24} | TIED), add_one),
    "gemma2": Gguf(ARCH.GEMMA2, Case("Gemma2", GEMMA2), add_one, gemma2),
    "gemma3": Gguf(
        ARCH.GEMMA3,
        Case("Gemma3", GEMMA2 | {"rope_parameters": GEMMA3_ROPE}, config="Gemma3TextConfig"),
        add_one,
        listed_windows,
    ),
    "phi2": Gguf(ARCH.PHI2, Case("Phi", {"num_key_value_heads": 4}), keys=part_rotary),
    "phi2-fused": Gguf(ARCH.PHI2, Case("Phi", {"num_key_value_heads": 4}), fuse_qkv, part_rotary),
    "phi3": Gguf(ARCH.PHI3, Case("Phi3", {"sliding_window": 9}), keys=phi3),
    "phi4-mini-longrope": Gguf(
        ARCH.PHI3, Case("Phi3", TIED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}), keys=phi3
    ),
    "gpt2": Gguf(ARCH.GPT2, Case("GPT2", GPT), transpose),
    "gptneox": Gguf(ARCH.GPTNEOX, Case("GPTNeoX", {"num_key_value_heads": ...}), regroup, neox),
    "gptneox-sequential": Gguf(
        ARCH.GPTNEOX, Case("GPTNeoX", {"num_key_value_heads": ..., "use_parallel_residual": False}), regroup, neox
    ),
    "falcon-7b": Gguf(ARCH.FALCON, Case("Falcon", GPT), regroup, falcon),
    "falcon-40b": Gguf(
        ARCH.FALCON, Case("Falcon", GPT | {"new_decoder_architecture": True, "num_kv_heads": 2}), regroup, falcon
    ),
    "bloom": Gguf(ARCH.BLOOM, Case("Bloom", GPT | {"max_position_embeddings": ..., "seq_length": 64}), bloom),
    "mpt": Gguf(
        ARCH.MPT,
        Case("Mpt", MPT),
        keys=mpt,
    ),
    # The converter leaves out the window, and llama.cpp has none.
    "starcoder2": Gguf(ARCH.STARCODER2, Case("Starcoder2", TIED | {"sliding_window": None})),
    "stablelm": Gguf(ARCH.STABLELM, Case("StableLm", {"use_qkv_bias": True}), keys=stablelm),
    # Its norms of heads are more than config.json's policy reads.
    "stablelm-12b": Gguf(
        ARCH.STABLELM,
        Case("StableLm", {"use_parallel_residual": True, "qk_layernorm": True}),
        head_norms,
        stablelm,
        differs=("*",),
    ),
    "olmo2": Gguf(ARCH.OLMO2, Case("Olmo2")),
    "olmo3": Gguf(
        ARCH.OLMO2,
        Case("Olmo3", WINDOWS | {"rope_parameters": {FULL: YARN, LOCAL: {"rope_type": "default", "rope_theta": 1e4}}}),
        keys=listed_windows,
    ),
    "command-r": Gguf(ARCH.COMMAND_R, Case("Cohere", {"use_qk_norm": True} | TIED), keys=cohere),
    "cohere2": Gguf(ARCH.COHERE2, Case("Cohere2", WINDOWS | TIED), keys=cohere),
    "granite": Gguf(
        ARCH.GRANITE,
        Case(
            "Granite",
            {
                "attention_multiplier": 0.15,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "logits_scaling": 2.0,
            },
        ),
        permute_rotary,
        granite,
    ),
    "glm4": Gguf(ARCH.GLM4, Case("Glm4", {"head_dim": 16}), keys=part_rotary),
    "smollm3": Gguf(ARCH.SMOLLM3, Case("SmolLM3", TIED | {"num_hidden_layers": 4}), permute_rotary),
    "gpt-oss": Gguf(
        ARCH.GPT_OSS,
        Case(
            "GptOss",
            {
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 9,
                "layer_types": [LOCAL, FULL],
                "rope_parameters": YARN | {"truncate": False},
            },
        ),
        gpt_oss,
        oss,
    ),
    "deepseek-v2": Gguf(
        ARCH.DEEPSEEK2,
        Case(
            "DeepseekV2",
            LATENT | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        ),
        split_experts,
        latent,
    ),
    "deepseek-v3": Gguf(
        ARCH.DEEPSEEK2,
        Case("DeepseekV3", LATENT | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
        split_latent,
        latent,
    ),
}


def write(path, made: Gguf, model, store=lambda tensor: None) -> None:
    """The file of a model; `store` gives a matrix's data and type, or nothing to keep it in float32."""
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[made.arch])
    usual_keys(writer, model.config)
    made.keys(writer, model.config)
    for name, tensor in tensors_of(model, made.arch, made.convert).items():
        is_matrix = tensor.ndim > 1 and "norm" not in name
        data, kind = (is_matrix and store(tensor)) or (tensor, Kind.F32)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_equal(ours: Any, theirs: Any, name: str) -> None:
    """Floats of a file have 32 bits."""
    if dataclasses.is_dataclass(ours):
        for field in dataclasses.fields(ours):
            assert_equal(getattr(ours, field.name), getattr(theirs, field.name), f"{name}.{field.name}")
    else:
        numbers = isinstance(ours, float) or (isinstance(ours, tuple) and None not in ours)
        assert (ours == pytest.approx(theirs, rel=1e-6)) if numbers else (ours == theirs), name


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    """Logits, and the config: it is what the family's config.json says, so the tree can be exported."""
    made = CASES[name]
    model = make_model(made.case)
    write(tmp_path / "model.gguf", made, model)
    params = dsjax.load(tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 40))
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.05
    np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=TOLERANCE)
    if made.differs:
        return
    assert_equal(params.config, policies.load_config(model), "config")
    policies.get(params.config.model_type).write_config(params.config)


def encoded(kind: Kind, tensor: np.ndarray) -> tuple[np.ndarray, Kind]:
    return gguf.quantize(tensor, kind), kind


def decoded(kind: Kind, tensor: np.ndarray) -> tuple[np.ndarray, Kind]:
    return gguf.dequantize(gguf.quantize(tensor, kind), kind), Kind.F32


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("phi3", Kind.Q4_0),  # q, k and v are rows of one tensor, and so are gate and up
        ("falcon-40b", Kind.Q8_0),
        ("mixtral-per-expert", Kind.Q8_0),
        ("mixtral", Kind.Q4_1),
        ("deepseek-v2", Kind.Q8_0),
        ("deepseek-v3", Kind.Q8_0),
    ],
)
def test_quantized_tensors_stay_so(name, kind, tmp_path):
    """A quantized file and a plain file of the same values give the same leaves, quantized where whole blocks are."""
    made = CASES[name]
    model = make_model(made.case)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    leaves = {}
    for store in (encoded, decoded):
        path = tmp_path / f"{store.__name__}.gguf"
        write(path, made, model, lambda tensor, store=store: tensor.shape[-1] % block == 0 and store(kind, tensor))
        leaves[store] = flatten(dsjax.load(path))
    for path, leaf in leaves[encoded].items():
        # DeepSeek's keys are turned, so blocks lie across them.
        turned = name == "deepseek-v3" and path.endswith("k_up.weight")
        whole = leaf.ndim > 1 and leaf.shape[-1] % block == 0 and not turned
        assert isinstance(leaf, QuantizedArray) == whole, path
        plain = leaf.dequantize() if whole else leaf
        np.testing.assert_allclose(plain, leaves[decoded][path], rtol=1e-6, atol=1e-7, err_msg=path)


def test_exports_as_hugging_face_stores_it(tmp_path):
    """Gemma's scales are around zero again, and transformers computes the same."""
    made = CASES["gemma2"]
    model = make_model(made.case)
    write(tmp_path / "model.gguf", made, model)
    policies.export_hf(dsjax.load(tmp_path / "model.gguf"), tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 40))
    np.testing.assert_allclose(torch_logits(again, tokens), torch_logits(model, tokens), atol=1e-5)
