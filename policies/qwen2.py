"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers when switched on."""

from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Policy
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse

_LAYER_TYPES = ("full_attention", "sliding_attention")


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers would take 32 for an absent field, where Llama takes the number of query heads.
    field(raw, "num_key_value_heads", int)
    window = None
    if field(raw, "use_sliding_window", bool, False) and raw.get("sliding_window") is not None:
        window = field(raw, "sliding_window", int)
    types = raw.get("layer_types")
    if types is None:
        # Layers below max_window_layers attend to everything; 28 is what transformers takes for an absent field.
        first = field(raw, "max_window_layers", int, 28)
        types = [_LAYER_TYPES[i >= first and window is not None] for i in range(field(raw, "num_hidden_layers", int))]
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ConfigError(f"layer_types has {kind!r}; supported are {', '.join(_LAYER_TYPES)}")
        if kind == "sliding_attention" and window is None:
            raise ConfigError("layer_types has 'sliding_attention', but use_sliding_window/sliding_window is not set")
    if len(types) != field(raw, "num_hidden_layers", int):
        raise ConfigError(f"layer_types names {len(types)} layers, num_hidden_layers is {raw['num_hidden_layers']}")
    return decoder_config(
        raw, attention_bias=True, window=lambda layer: window if types[layer] == "sliding_attention" else None
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    sizes = set(config.windows) - {None}
    refuse(
        config,
        "qwen2",
        windows=len(sizes) > 1,
        attention_bias=not config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        mlp_bias=config.mlp_bias,
    )
    windows = {
        "use_sliding_window": bool(sizes),
        "sliding_window": next(iter(sizes), None),
        "layer_types": [_LAYER_TYPES[config.window(i) is not None] for i in range(config.num_layers)],
    }
    return decoder_fields(config, "Qwen2ForCausalLM") | windows


QWEN2 = Policy(
    name="qwen2",
    model_types=("qwen2",),
    weights=DECODER_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    fixed={"use_mrope": False},
)
