"""InternLM (the first): Llama with biases on the projections of attention."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import ActivationField, Custom, Field, field, sizes


def _read_rotary(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base; of type `dynamic` it grows only with texts longer than max_position_embeddings, our longest."""
    rotary = field(raw, "rotary", dict, {})
    if unknown := rotary.keys() - {"base", "type", "scaling_factor"}:
        raise ConfigError(f"config field rotary has {sorted(unknown)}, which are unknown to the internlm policy")
    if rotary.get("type", "dynamic") not in ("origin", "dynamic"):
        raise ConfigError(f"config field rotary.type={rotary['type']!r} is not supported; origin and dynamic are")
    if rotary.get("scaling_factor", 1.0) != 1.0:
        raise ConfigError(
            f"config field rotary.scaling_factor={rotary['scaling_factor']!r} is not supported; only 1 is"
        )
    return {"rope_theta": field(rotary, "base", float, 10000.0)}


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    return {"rotary": {"base": config.rope_theta, "type": "dynamic"}}


INTERNLM = Policy(
    name="internlm",
    model_types=("internlm",),
    architecture="InternLMForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Custom(("rotary",), _read_rotary, _write_rotary),
        Field("bias", ALL_BIASES, bool, True),
    ),
)
