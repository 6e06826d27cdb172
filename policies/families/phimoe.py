"""Phi-3.5-MoE: layer norms, LongRoPE, and two experts that SparseMixer chooses one after the other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Either, Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, LAYER, RMS_EPS
from policies.expert_maps import EXAMPLE, ROUTER_LOSS, one_by_one, router, stacked
from policies.fields import REQUIRED, ActivationField, Field, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

# A file has a tensor for each expert, transformers' module (since 5) one for all.
_SPELLINGS = (
    (
        router(f"{LAYER}.block_sparse_moe.gate.weight"),
        *one_by_one(f"{LAYER}.block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    (
        router(f"{LAYER}.mlp.router.weight"),
        *stacked(f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"),
    ),
)
_SCALES = ("short_mscale", "long_mscale")


class _PhimoeRope(Rope):
    """Rotary fields, where LongRoPE's attention factor is given twice: for short texts and for long ones."""

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        values = raw.get(name) or {}
        if values.get("rope_type", values.get("type", "default")) == "default":
            return super().read(raw, known)
        short, long = (field(values, scale, float) for scale in _SCALES)
        if short != long:
            raise ConfigError(f"{name}.short_mscale={short} and long_mscale={long} differ, which is not supported")
        rest = {key: value for key, value in values.items() if key not in _SCALES}
        return super().read({**raw, name: rest | {"attention_factor": short}}, known)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        if config.rope_scaling is not None:
            written["rope_scaling"] |= dict.fromkeys(_SCALES, config.rope_scaling.attention_factor)
        return written


PHIMOE = Policy(
    name="phimoe",
    model_types=("phimoe",),
    architecture="PhimoeForCausalLM",
    weights=dataclasses.replace(DECODER_WEIGHTS, entries=(*DECODER_WEIGHTS.entries, Either(_SPELLINGS))),
    config=(
        # transformers would take 8 for an absent num_key_value_heads, where Llama takes the number of query heads.
        *sizes(kv_heads=REQUIRED),
        RMS_EPS,
        _PhimoeRope(theta=1e6),
        ActivationField(),
        Windows(lists_types=False),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("lm_head_bias", "head_bias", bool, False),
        Field("num_local_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token", int, 2),
        Field("intermediate_size", "experts.size"),
        Field("router_jitter_noise", "experts.jitter", float, 0.01),
    ),
    traits={"norm": "layer", "norm_bias": True, "experts.score": "sparsemixer"},
    # Training alone adds noise to what enters the experts.
    harmless=ROUTER_LOSS | {"input_jitter_noise"},
    example=EXAMPLE | {"experts.count": 2, "experts.per_token": 2},
)
