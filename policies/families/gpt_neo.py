"""GPT-Neo: GPT-2 with windows in some layers, and scores that are not scaled."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Policy, each
from policies.decoder import KINDS
from policies.fields import ActivationField, Custom, Field, field
from policies.gpt import (
    BLOCK,
    EQUAL_HEADS,
    GPT_POSITIONS,
    HARMLESS,
    LAYER_NORM_EPSILON,
    TRAITS,
    four_times_hidden,
    gpt_sizes,
    gpt_weights,
)

_DEFAULT_WINDOW = 256


def _read_windows(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers are listed as `[[["global", "local"], 12]]`: both in turns, twelve times."""
    window = field(raw, "window_size", int, _DEFAULT_WINDOW)
    try:
        pattern = field(raw, "attention_types", list, [[["global", "local"], 12]])
        kinds = [str(kind) for group, count in pattern for _ in range(count) for kind in group]
    except (TypeError, ValueError):
        raise ConfigError(
            f'attention_types={raw["attention_types"]!r} should be like [[["global", "local"], 12]]'
        ) from None
    listed = field(raw, "attention_layers", list, kinds)
    if listed != kinds:
        raise ConfigError(f"attention_layers={listed} and attention_types, which gives {kinds}, differ; keep one")
    if unknown := set(kinds) - {"global", "local"}:
        raise ConfigError(f"attention_types has {sorted(unknown)}; supported are 'global' and 'local'")
    if len(kinds) != known["num_layers"]:
        raise ConfigError(f"attention_types names {len(kinds)} layers, num_layers is {known['num_layers']}")
    return {"windows": tuple(window if kind == "local" else None for kind in kinds) if "local" in kinds else ()}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    kinds = ["global" if config.window(i) is None else "local" for i in range(config.num_layers)]
    size = next((window for window in config.windows if window), _DEFAULT_WINDOW)
    return {"attention_types": [[kinds, 1]], "window_size": size}


GPT_NEO = Policy(
    name="gpt_neo",
    model_types=("gpt_neo",),
    architecture="GPTNeoForCausalLM",
    weights=gpt_weights(
        *(
            entry
            for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}.items()
            for entry in each(KINDS, f"layers.{{i}}.attention.{leaf}", f"{BLOCK}.attn.attention.{tensor}")
        ),
    ),
    config=(
        *gpt_sizes(hidden="hidden_size", layers="num_layers", heads="num_heads"),
        EQUAL_HEADS,
        Field("max_position_embeddings", "max_context"),
        GPT_POSITIONS,
        Field("intermediate_size", "intermediate_size", default=four_times_hidden),
        LAYER_NORM_EPSILON,
        ActivationField("activation_function", "gelu_new"),
        Custom(("attention_types", "attention_layers", "window_size"), _read_windows, _write_windows),
    ),
    traits={
        **TRAITS,
        **dict.fromkeys(("attention_out_bias", "mlp_bias"), True),
        "attention_scale": 1.0,
        "rotary_dim": 0,
    },
    harmless=HARMLESS,
)
