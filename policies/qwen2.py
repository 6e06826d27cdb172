"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers when switched on."""

from collections.abc import Sequence
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Policy
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse

WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_LAYER_TYPES = ("full_attention", "sliding_attention")


def windows_of(raw: dict[str, Any]) -> Sequence[int | None]:
    """Sliding window of each layer, from the fields `WINDOW_FIELDS` of a parsed config.json.

    Raises:
      ConfigError: the fields contradict each other.
    """
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
    return [window if kind == "sliding_attention" else None for kind in types]


def window_fields(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `windows_of`.

    Raises:
      ConfigError: layers have windows of different sizes.
    """
    sizes = set(config.windows) - {None}
    refuse(config, config.model_type, windows=len(sizes) > 1)
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": next(iter(sizes), None),
        "layer_types": [_LAYER_TYPES[config.window(i) is not None] for i in range(config.num_layers)],
    }


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers would take 32 for an absent field, where Llama takes the number of query heads.
    field(raw, "num_key_value_heads", int)
    return decoder_config(raw, attention_bias=True, window=windows_of(raw).__getitem__)


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    refuse(
        config,
        "qwen2",
        attention_bias=not config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        mlp_bias=config.mlp_bias,
    )
    return decoder_fields(config, "Qwen2ForCausalLM") | window_fields(config)


QWEN2 = Policy(
    name="qwen2",
    model_types=("qwen2",),
    weights=DECODER_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | WINDOW_FIELDS,
    fixed={"use_mrope": False},
)
