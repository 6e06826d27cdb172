"""OLMoE: experts in every layer, and queries and keys that are normed whole."""

import dataclasses

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, LAYER
from policies.expert_maps import EXAMPLE, EXPERTS, ROUTER_LOSS, router
from policies.fields import ActivationField, Field, sizes
from policies.rope_fields import Rope

OLMOE = Policy(
    name="olmoe",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    weights=dataclasses.replace(
        DECODER_WEIGHTS, entries=(*DECODER_WEIGHTS.entries, router(f"{LAYER}.mlp.gate.weight"), EXPERTS)
    ),
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-5),
        Rope(),
        ActivationField(),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("num_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("intermediate_size", "experts.size"),
        Field("norm_topk_prob", "experts.renormalize", bool, False),
    ),
    traits={"qk_norm": "whole"},
    harmless=ROUTER_LOSS,
    # It would clip after the norms, and no published model does.
    fixed={"clip_qkv": None},
    example=EXAMPLE,
)
