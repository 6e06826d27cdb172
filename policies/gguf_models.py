"""llama.cpp's model architectures: GGUF metadata as a `ModelConfig`, and which weight map goes with it.

A file does not say which activation a model has, nor that GELU stands for its exact form, which llama.cpp always
approximates by tanh: what the Hugging Face family has is taken here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.alibi import alibi_slopes
from policies.base import TensorSource, WeightMap
from policies.fields import model_config
from policies.gguf_fields import Metadata, Reader, experts, heads, part_rotary, rotary, sizes, windows
from policies.gguf_latent import GGUF_LATENT, latent_experts, latent_heads, latent_rotary
from policies.gguf_maps import GGUF, GGUF_FALCON, GGUF_FUSED_MLP, GGUF_GPT_OSS, GGUF_INTERLEAVED, GGUF_PLUS_ONE


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """One value of `general.architecture`.

    Attributes:
      model_type: the family as Hugging Face names it.
      weights: where its tensors go.
      readers: what gives the config's fields, in this order, after `sizes` and `heads`.
      traits: fields of `ModelConfig` that are the same in every model.
      harmless: further keys that do not change what the model computes.
      fixed: further keys that must have the given value.
      heads: what gives the sizes of heads.
    """

    model_type: str
    weights: WeightMap = GGUF
    readers: tuple[Reader, ...] = (rotary,)
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Reader = heads


def _llama(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    # Files of Mistral and Mixtral name the architecture "llama" too.
    if "experts.count" in known:
        return {"model_type": "mixtral"}
    return {"model_type": "mistral"} if known.get("windows") else {}


def _gemma(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"embed_scale": known["hidden_size"] ** 0.5}


def _gemma_scale(layers_of_27b: int) -> Reader:
    """The scale of scores, which files do not hold: that of the 27B model is not that of its head size."""

    def read(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
        of_width = known["num_layers"] == layers_of_27b
        size = known["hidden_size"] // known["num_heads"] if of_width else known["head_dim"]
        return {"attention_scale": size**-0.5}

    return read


def _gemma2_caps(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_soft_cap": file.get("attn_logit_softcapping", float, 50.0) or None,
        "logit_soft_cap": file.get("final_logit_softcapping", float, 30.0) or None,
    }


def _gemma3(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "local_rope_theta": file.get("rope.freq_base_swa", float, 10000.0),
        "logit_soft_cap": file.get("final_logit_softcapping", float, 0.0) or None,
    }


def _falcon(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"shared_norm": not file.has("attn_norm_2.weight")}


def _gptneox(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"parallel_block": file.get("use_parallel_residual", bool)}


def _stablelm(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    # Converters write use_parallel_residual=True where the field is absent, so llama.cpp looks for the norm as well.
    parallel = not file.has("ffn_norm.weight")
    return {"parallel_block": parallel, "shared_norm": parallel} | _head_norms(file, known)


def _head_norms(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "heads"} if file.has("attn_q_norm.weight") else {}


def _positions(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"learned_positions": known["max_context"]}


def _bloom(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"alibi_slopes": alibi_slopes(known["num_heads"])}


def _mpt(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    bias_max = file.get("attention.max_alibi_bias", float, 0.0)
    if not bias_max:
        raise ConfigError(f"{file.origin}: an mpt model without {file.prefix}attention.max_alibi_bias is not supported")
    return {
        "alibi_slopes": alibi_slopes(known["num_heads"], bias_max),
        "clip_qkv": file.get("attention.clamp_kqv", float, 0.0) or None,
    }


def _granite(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    # 0 is what llama.cpp has for "not used".
    return {
        "embed_scale": file.get("embedding_scale", float, 0.0) or 1.0,
        "residual_multiplier": file.get("residual_scale", float, 0.0) or 1.0,
        "attention_scale": file.get("attention.scale", float, 0.0) or None,
        "logit_scale": 1 / (file.get("logit_scale", float, 0.0) or 1.0),
    }


def _logit_scale(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": file.get("logit_scale", float)}


def _cohere2(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    unrotated = tuple(window is None for window in known.get("windows") or (None,) * known["num_layers"])
    return {"unrotated_layers": unrotated if any(unrotated) else ()}


def _olmo2(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    if not known.get("windows"):
        return {}
    # OLMo 3, in whose windows rotation is never stretched.
    return {"model_type": "olmo3", "local_rope_theta": file.get("rope.freq_base_swa", float, known["rope_theta"])}


def _smollm3(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    unrotated = tuple((i + 1) % 4 == 0 for i in range(known["num_layers"]))
    return {"unrotated_layers": unrotated if any(unrotated) else ()}


def _gpt_oss(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    scaling = known["rope_scaling"]
    if scaling is None or scaling.kind != "yarn":
        return {}
    return {"rope_scaling": dataclasses.replace(scaling, truncate=False)}


_GPT = {"norm": "layer", "gated": False}
_GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh"}
_COHERE = {"norm": "layer", "parallel_block": True, "shared_norm": True, "rotary_interleaved": True}

_ARCHITECTURES = {
    "llama": _Architecture("llama", GGUF_INTERLEAVED, (rotary, windows(), experts(), _llama)),
    "qwen2": _Architecture("qwen2", readers=(rotary, windows())),
    "qwen3": _Architecture("qwen3", readers=(rotary, windows()), traits={"qk_norm": "head"}),
    "qwen2moe": _Architecture("qwen2_moe", readers=(rotary, experts(renormalize=False, shared=True))),
    "qwen3moe": _Architecture("qwen3_moe", readers=(rotary, experts()), traits={"qk_norm": "head"}),
    "gemma": _Architecture("gemma", GGUF_PLUS_ONE, (rotary, _gemma), _GEMMA),
    "gemma2": _Architecture(
        "gemma2",
        GGUF_PLUS_ONE,
        (rotary, _gemma, _gemma_scale(46), windows(2, default=4096), _gemma2_caps),
        {**_GEMMA, "norm_placement": "both"},
    ),
    "gemma3": _Architecture(
        "gemma3_text",
        GGUF_PLUS_ONE,
        (rotary, _gemma, _gemma_scale(62), windows(6), _gemma3),
        {**_GEMMA, "norm_placement": "both", "qk_norm": "head"},
    ),
    "phi2": _Architecture(
        "phi",
        readers=(part_rotary,),
        traits={**_GPT, "activation": "gelu_tanh", "parallel_block": True, "shared_norm": True},
    ),
    # llama.cpp leaves out the window, with a warning; the model was trained with it.
    "phi3": _Architecture("phi3", GGUF_FUSED_MLP, (part_rotary, windows())),
    "gpt2": _Architecture("gpt2", readers=(_positions,), traits={**_GPT, "activation": "gelu_tanh", "rotary_dim": 0}),
    "gptneox": _Architecture("gpt_neox", readers=(part_rotary, _gptneox), traits={**_GPT, "activation": "gelu"}),
    "falcon": _Architecture(
        "falcon", GGUF_FALCON, (rotary, _falcon), {**_GPT, "activation": "gelu", "parallel_block": True}
    ),
    "bloom": _Architecture(
        "bloom", readers=(_bloom,), traits={**_GPT, "activation": "gelu_tanh", "rotary_dim": 0, "embed_norm": True}
    ),
    "mpt": _Architecture("mpt", readers=(_mpt,), traits={**_GPT, "activation": "gelu", "rotary_dim": 0}),
    "starcoder2": _Architecture("starcoder2", readers=(rotary, windows()), traits={**_GPT, "activation": "gelu_tanh"}),
    "stablelm": _Architecture(
        "stablelm",
        readers=(part_rotary, _stablelm),
        traits={"norm": "layer"},
        harmless=frozenset({"use_parallel_residual"}),
    ),
    "olmo2": _Architecture(
        "olmo2", readers=(rotary, windows(4), _olmo2), traits={"norm_placement": "output", "qk_norm": "whole"}
    ),
    "command-r": _Architecture("cohere", readers=(rotary, _logit_scale, _head_norms), traits=_COHERE),
    "cohere2": _Architecture("cohere2", readers=(rotary, _logit_scale, windows(4), _cohere2), traits=_COHERE),
    # Here the key switches rotation off.
    "granite": _Architecture("granite", GGUF_INTERLEAVED, (rotary, _granite), fixed={"rope.scaling.finetuned": True}),
    "glm4": _Architecture(
        "glm4", GGUF_FUSED_MLP, (part_rotary,), {"rotary_interleaved": True, "norm_placement": "both"}
    ),
    "smollm3": _Architecture("smollm3", GGUF_INTERLEAVED, (rotary, _smollm3)),
    "gpt-oss": _Architecture(
        "gpt_oss",
        GGUF_GPT_OSS,
        (rotary, windows(2), experts(), _gpt_oss),
        {"sinks": True, "activation": "clamped_swiglu"},
    ),
    "deepseek2": _Architecture(
        "deepseek_v2",
        GGUF_LATENT,
        (latent_rotary, latent_experts),
        {"rotary_interleaved": True},
        heads=latent_heads,
    ),
}


def _architecture(name: str) -> _Architecture:
    if name not in _ARCHITECTURES:
        raise ConfigError(f"GGUF architecture '{name}' is not supported; supported are: {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[name]


def gguf_weights(architecture: str) -> WeightMap:
    """The weight map of a `general.architecture`.

    Raises:
      ConfigError: the architecture is not supported; the message lists those that are.
    """
    return _architecture(architecture).weights


def gguf_token_ids(metadata: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a text, or `None`, and the ids that end a generation: end of text, of turn, of message.

    Raises:
      ConfigError: one is not an integer.
    """
    bos, *ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    for value in (bos, *ends):
        if value is not None and not isinstance(value, int):
            raise ConfigError(f"a special token's id in the metadata is {value!r}, not an integer")
    return bos, tuple(dict.fromkeys(end for end in ends if end is not None))


def gguf_config(metadata: Mapping[str, Any], source: TensorSource) -> ModelConfig:
    """Configuration of a GGUF file.

    Args:
      metadata: its key-value section.
      source: its tensors: which of them exist says whether there are biases and a head of its own, and some hold rotary
        factors.

    Raises:
      ConfigError: the architecture is not supported, or a metadata field is missing, malformed or not supported.
      CheckpointError: there is no embedding.
    """
    name = str(metadata.get("general.architecture"))
    architecture = _architecture(name)
    file = Metadata(metadata, name, source)
    bos_id, eos_ids = gguf_token_ids(metadata)
    known = {"model_type": architecture.model_type, "bos_id": bos_id, "eos_ids": eos_ids, **architecture.traits}
    for read in (sizes, architecture.heads, *architecture.readers):
        known |= read(file, known)
    file.refuse_others(architecture.harmless, architecture.fixed)
    return model_config(known)
