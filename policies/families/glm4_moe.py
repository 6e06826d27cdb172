"""GLM-4.5 and 4.6: grouped-query attention with half of each head rotated, and DeepSeek-V3's experts."""

import dataclasses

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS, IGNORED, LAYER, RMS_EPS
from policies.expert_maps import (
    CORRECTION,
    DENSE_FIRST,
    EXAMPLE,
    EXPERTS,
    ROUTER_LOSS,
    SHARED_COUNT,
    V3_ROUTING,
    V3_TRAITS,
    router,
    shared,
)
from policies.fields import REQUIRED, ActivationField, Custom, Field, field, sizes
from policies.rope_fields import Rope

GLM4_MOE = Policy(
    name="glm4_moe",
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    weights=dataclasses.replace(
        DECODER_WEIGHTS,
        entries=(
            *DECODER_WEIGHTS.entries,
            router(f"{LAYER}.mlp.gate.weight"),
            CORRECTION,
            EXPERTS,
            *shared(f"{LAYER}.mlp.shared_experts"),
        ),
        # Files of 46 and of 92 layers hold one more, which predicts a second token.
        ignored=(*IGNORED, r"model\.layers\.(46|92)\..*"),
    ),
    config=(
        # transformers would take 8 for an absent num_key_value_heads, where Llama takes the number of query heads.
        *sizes(kv_heads=REQUIRED),
        RMS_EPS,
        Rope(partial=0.5),
        ActivationField(),
        Field("attention_bias", "attention_bias", bool, False),
        Custom(
            ("use_qk_norm",),
            lambda raw, known: {"qk_norm": "head" if field(raw, "use_qk_norm", bool, False) else None},
            lambda config: {"use_qk_norm": config.qk_norm is not None},
        ),
        Field("n_routed_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("moe_intermediate_size", "experts.size"),
        SHARED_COUNT,
        DENSE_FIRST,
        *V3_ROUTING,
    ),
    traits=V3_TRAITS,
    harmless=ROUTER_LOSS | {"num_nextn_predict_layers", "num_mtp_layers"},
    example=EXAMPLE | {"experts.shared_size": 1},
)
