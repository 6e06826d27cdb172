"""Qwen3-MoE: Qwen3 with a mixture of experts in some or all layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, LAYER, RMS_EPS
from policies.expert_maps import EXAMPLE, EXPERTS, ROUTER_LOSS, SparseLayers, router
from policies.fields import REQUIRED, ActivationField, Custom, Field, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows


def _read_count(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    count = field(raw, "num_experts", int, raw.get("num_local_experts"))
    if raw.get("num_local_experts") not in (None, count):
        raise ConfigError(f"num_experts={count} and num_local_experts={raw['num_local_experts']} differ")
    return {"experts.count": field({"num_experts": count}, "num_experts", int)}


def _write_count(config: ModelConfig) -> dict[str, Any]:
    return {"num_experts": config.experts.count if config.experts else 0}


QWEN3_MOE = Policy(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    weights=dataclasses.replace(
        DECODER_WEIGHTS, entries=(*DECODER_WEIGHTS.entries, router(f"{LAYER}.mlp.gate.weight"), EXPERTS)
    ),
    config=(
        # transformers would take 4 for an absent num_key_value_heads, where Llama takes the number of query heads.
        *sizes(kv_heads=REQUIRED),
        RMS_EPS,
        Rope(),
        ActivationField(),
        # Unlike Qwen3, all layers have the window.
        Windows(switch="use_sliding_window", default=4096, lists_types=False),
        Field("attention_bias", ALL_BIASES, bool, False),
        # Published files say num_experts, transformers writes num_local_experts.
        Custom(("num_experts", "num_local_experts"), _read_count, _write_count),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("moe_intermediate_size", "experts.size"),
        Field("norm_topk_prob", "experts.renormalize", bool, False),
        SparseLayers(),
    ),
    traits={"qk_norm": "head"},
    harmless=ROUTER_LOSS | {"max_window_layers"},
    example=EXAMPLE,
)
