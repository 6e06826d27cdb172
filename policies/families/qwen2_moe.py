"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, and a gated network beside it that all tokens pass."""

import dataclasses

from policies.base import Entry, Policy
from policies.decoder import DECODER_WEIGHTS, LAYER, RMS_EPS
from policies.expert_maps import EXAMPLE, EXPERTS, ROUTER_LOSS, SparseLayers, router, shared
from policies.fields import REQUIRED, ActivationField, Field, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

QWEN2_MOE = Policy(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    weights=dataclasses.replace(
        DECODER_WEIGHTS,
        entries=(
            *DECODER_WEIGHTS.entries,
            router(f"{LAYER}.mlp.gate.weight"),
            EXPERTS,
            *shared(f"{LAYER}.mlp.shared_expert"),
            Entry("layers.{i}.mlp.shared_gate.weight", f"{LAYER}.mlp.shared_expert_gate.weight"),
        ),
    ),
    config=(
        # transformers would take 16 for an absent num_key_value_heads, where Llama takes the number of query heads.
        *sizes(kv_heads=REQUIRED),
        RMS_EPS,
        Rope(),
        ActivationField(),
        # Unlike Qwen2, the lower layers have windows, every other one of them.
        Windows(
            has_window=lambda raw, index: index % 2 == 0 and index < field(raw, "max_window_layers", int, 28),
            switch="use_sliding_window",
            default=4096,
            reads=frozenset({"max_window_layers"}),
        ),
        Field("qkv_bias", "attention_bias", bool, True),
        Field("num_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("moe_intermediate_size", "experts.size"),
        Field("shared_expert_intermediate_size", "experts.shared_size"),
        Field("norm_topk_prob", "experts.renormalize", bool, False),
        SparseLayers(),
    ),
    traits={"experts.shared_mix": "gate"},
    harmless=ROUTER_LOSS,
    example=EXAMPLE | {"experts.shared_size": 1},
)
