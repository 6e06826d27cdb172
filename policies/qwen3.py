"""Qwen3: Qwen2 with a norm of each head of q and k in place of the biases, and a head size of its own."""

from typing import Any

from dsjax.config import ModelConfig
from policies.base import Policy
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse
from policies.qwen2 import WINDOW_FIELDS, window_fields, windows_of


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # For absent fields transformers would take 32 and 128, where Llama takes what follows from the others.
    field(raw, "num_key_value_heads", int)
    field(raw, "head_dim", int)
    # Off in every published checkpoint; transformers gives the output projection a bias too.
    bias = field(raw, "attention_bias", bool, False)
    return decoder_config(
        raw, attention_bias=bias, attention_out_bias=bias, window=windows_of(raw).__getitem__, qk_norm=True
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    refuse(
        config,
        "qwen3",
        qk_norm=not config.qk_norm,
        attention_bias=config.attention_bias != config.attention_out_bias,
        mlp_bias=config.mlp_bias,
    )
    fields = decoder_fields(config, "Qwen3ForCausalLM", qk_norm=True) | window_fields(config)
    return fields | {"attention_bias": config.attention_bias}


QWEN3 = Policy(
    name="qwen3",
    model_types=("qwen3",),
    weights=DECODER_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | WINDOW_FIELDS | {"attention_bias"},
    traits={"qk_norm": True},
)
