"""SmolLM3: Llama in which each fourth layer does not rotate queries and keys."""

from collections.abc import Mapping
from typing import Any

from dsjax.errors import ConfigError
from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Custom, Field, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows


def _rotates(raw: Mapping[str, Any], index: int) -> bool:
    """Whether a layer does; the field is named after those that do not and is 1 for those that do."""
    listed = field(raw, "no_rope_layers", list, None)
    if listed is not None:
        if len(listed) != raw["num_hidden_layers"]:
            raise ConfigError(f"no_rope_layers names {len(listed)} layers, num_hidden_layers is not that many")
        return bool(listed[index])
    return (index + 1) % field(raw, "no_rope_layer_interval", int, 4) != 0


def _read_rotated(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    unrotated = tuple(not _rotates(raw, i) for i in range(known["num_layers"]))
    return {"unrotated_layers": unrotated if any(unrotated) else ()}


_ROTATED_LAYERS = Custom(
    ("no_rope_layers", "no_rope_layer_interval"),
    _read_rotated,
    lambda config: {"no_rope_layers": [int(config.layer(i).rotary is not None) for i in range(config.num_layers)]},
)

SMOLLM3 = Policy(
    name="smollm3",
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        # transformers would take 4 for an absent num_key_value_heads.
        *sizes(kv_heads=REQUIRED, tied=True),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(theta=2e6),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
        _ROTATED_LAYERS,
        Windows(has_window=lambda raw, index: not _rotates(raw, index), switch="use_sliding_window"),
    ),
    harmless=frozenset({"max_window_layers"}),
)
