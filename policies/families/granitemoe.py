"""GraniteMoE: Granite with a mixture of experts, whose weights are one tensor a layer in files too."""

import dataclasses

from policies.base import Either, Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, LAYER
from policies.expert_maps import EXAMPLE, ROUTER_LOSS, router, stacked
from policies.families.granite import LOGITS_SCALING
from policies.fields import ActivationField, Field, sizes
from policies.rope_fields import Rope

_MODULE = f"{LAYER}.block_sparse_moe"
# Files keep names that transformers' module (since 5) has no more.
_SPELLINGS = (
    (
        router(f"{_MODULE}.router.layer.weight"),
        *stacked(f"{_MODULE}.input_linear.weight", f"{_MODULE}.output_linear.weight"),
    ),
    (
        router(f"{_MODULE}.router.weight"),
        *stacked(f"{_MODULE}.experts.gate_up_proj", f"{_MODULE}.experts.down_proj"),
    ),
)

GRANITE_MOE = Policy(
    name="granitemoe",
    model_types=("granitemoe",),
    architecture="GraniteMoeForCausalLM",
    weights=dataclasses.replace(DECODER_WEIGHTS, entries=(*DECODER_WEIGHTS.entries, Either(_SPELLINGS))),
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("embedding_multiplier", "embed_scale", float, 1.0),
        Field("attention_multiplier", "attention_scale", float, 1.0),
        Field("residual_multiplier", "residual_multiplier", float, 1.0),
        LOGITS_SCALING,
        Field("num_local_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("intermediate_size", "experts.size"),
    ),
    harmless=ROUTER_LOSS,
    example=EXAMPLE,
)
