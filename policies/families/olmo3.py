"""OLMo 3: OLMo 2 with a window on three layers of four, where rotation is never stretched."""

import dataclasses
from typing import Any

from dsjax.config import ModelConfig
from policies.base import Policy
from policies.families.olmo2 import OLMO2_FIELDS, OLMO2_TRAITS, OUTPUT_NORM_WEIGHTS
from policies.rope_fields import Rope
from policies.window_fields import Windows


@dataclasses.dataclass(frozen=True)
class _RopeByType(Rope):
    """Rotary fields by the type of layer: transformers has no other spelling of the base in windows."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Both types' parameters."""
        plain = super().write(config)
        full = {"rope_type": "default", "rope_theta": config.rope_theta} | (plain["rope_scaling"] or {})
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


OLMO3 = Policy(
    name="olmo3",
    model_types=("olmo3",),
    architecture="Olmo3ForCausalLM",
    weights=OUTPUT_NORM_WEIGHTS,
    config=(
        *OLMO2_FIELDS,
        _RopeByType(theta=5e5, local="rope_local_base_freq", local_theta=5e5),
        Windows(has_window=lambda raw, index: (index + 1) % 4 != 0, default=4096),
    ),
    traits=OLMO2_TRAITS,
)
