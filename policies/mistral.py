"""Mistral: Llama without biases, with one sliding window for all layers."""

from typing import Any

from dsjax.config import ModelConfig
from policies.base import Policy
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers would take 8 for an absent field, where Llama takes the number of query heads.
    field(raw, "num_key_value_heads", int)
    # "sliding_window": 4096 there lets a query see itself and the 4095 tokens before it, as here.
    window = None if raw.get("sliding_window") is None else field(raw, "sliding_window", int)
    return decoder_config(raw, window=lambda layer: window)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    windows = set(config.windows) or {None}
    refuse(
        config,
        "mistral",
        windows=len(windows) > 1,
        attention_bias=config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        mlp_bias=config.mlp_bias,
    )
    return decoder_fields(config, "MistralForCausalLM") | {"sliding_window": windows.pop()}


MISTRAL = Policy(
    name="mistral",
    model_types=("mistral",),
    weights=DECODER_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | {"sliding_window"},
    fixed={"attention_bias": False, "mlp_bias": False},
)
