"""Llama, and the many that share its config.json (SmolLM, TinyLlama, Yi, ...)."""

from typing import Any

from dsjax.config import ModelConfig
from policies.base import Policy
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers gives the output projection a bias too, unlike Qwen2.
    bias = field(raw, "attention_bias", bool, False)
    mlp_bias = field(raw, "mlp_bias", bool, False)
    return decoder_config(raw, attention_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    refuse(
        config, "llama", windows=any(config.windows), attention_bias=config.attention_bias != config.attention_out_bias
    )
    fields = decoder_fields(config, "LlamaForCausalLM")
    return fields | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


LLAMA = Policy(
    name="llama",
    model_types=("llama",),
    weights=DECODER_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | {"attention_bias", "mlp_bias"},
    harmless=frozenset({"is_llama_config", "max_sequence_length"}),
    fixed={"rope_interleaved": False},
)
