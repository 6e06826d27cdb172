"""Mixtral: Mistral with a mixture of experts in every layer."""

import dataclasses

from policies.base import Either, Policy
from policies.decoder import DECODER_WEIGHTS, LAYER, RMS_EPS
from policies.expert_maps import EXAMPLE, ROUTER_LOSS, one_by_one, router, stacked
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

# A file has a tensor for each expert, transformers' module (since 5) one for all.
_SPELLINGS = (
    (
        router(f"{LAYER}.block_sparse_moe.gate.weight"),
        *one_by_one(f"{LAYER}.block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    (
        router(f"{LAYER}.mlp.gate.weight"),
        *stacked(f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"),
    ),
)

MIXTRAL = Policy(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    weights=dataclasses.replace(DECODER_WEIGHTS, entries=(*DECODER_WEIGHTS.entries, Either(_SPELLINGS))),
    config=(
        # transformers would take 8 for an absent field, where Llama takes the number of query heads.
        *sizes(kv_heads=REQUIRED),
        RMS_EPS,
        Rope(theta=1e6),
        ActivationField(),
        Windows(lists_types=False),
        Field("num_local_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("intermediate_size", "experts.size"),
    ),
    harmless=ROUTER_LOSS | {"router_jitter_noise"},
    fixed={"attention_bias": False, "mlp_bias": False},
    example=EXAMPLE,
)
