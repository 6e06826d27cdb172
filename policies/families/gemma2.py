"""Gemma 2: Gemma with norms after attention and feed-forward too, soft caps, and a window on every other layer."""

from collections.abc import Mapping
from typing import Any

from policies.base import Policy, WeightMap
from policies.decoder import ATTENTION, EMBEDDINGS, IGNORED, LAYER, MLP, QK_NORMS, norm
from policies.families.gemma import GEMMA_FIELDS, GEMMA_FIXED, GEMMA_HARMLESS
from policies.fields import ActivationField, Custom, Nullable, field
from policies.rope_fields import Rope
from policies.window_fields import Windows


def _read_scale(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_scale": field(raw, "query_pre_attn_scalar", float, 256.0) ** -0.5}


# transformers takes whole numbers only.
QUERY_SCALE = Custom(
    ("query_pre_attn_scalar",),
    _read_scale,
    lambda config: {"query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2)},
)
GEMMA2_ACTIVATION = ActivationField("hidden_activation", "gelu_pytorch_tanh")
GEMMA2_WEIGHTS = WeightMap(
    (
        *EMBEDDINGS,
        *norm("layers.{i}.attention_norm", f"{LAYER}.input_layernorm"),
        *norm("layers.{i}.attention_post_norm", f"{LAYER}.post_attention_layernorm"),
        *norm("layers.{i}.mlp_norm", f"{LAYER}.pre_feedforward_layernorm"),
        *norm("layers.{i}.mlp_post_norm", f"{LAYER}.post_feedforward_layernorm"),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
    ),
    IGNORED,
)
# Fields that stand in some files and that no release of transformers reads for these models.
GEMMA2_HARMLESS = GEMMA_HARMLESS | {"hidden_act", "sliding_window_size"}

GEMMA2 = Policy(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    weights=GEMMA2_WEIGHTS,
    config=(
        *GEMMA_FIELDS,
        GEMMA2_ACTIVATION,
        Rope(),
        QUERY_SCALE,
        Windows(has_window=lambda raw, index: index % 2 == 0, default=4096),
        Nullable("attn_logit_softcapping", "attention_soft_cap", float, 50.0),
        Nullable("final_logit_softcapping", "logit_soft_cap", float, 30.0),
    ),
    traits={"norm_offset": 1.0, "norm_placement": "both"},
    harmless=GEMMA2_HARMLESS,
    fixed=GEMMA_FIXED,
)
