"""OLMo 2: norms after attention and feed-forward instead of before them, and normed queries and keys."""

from policies.base import Policy, WeightMap
from policies.decoder import ALL_BIASES, ATTENTION, EMBEDDINGS, IGNORED, LAYER, MLP, QK_NORMS, norm
from policies.fields import ActivationField, Field, sizes
from policies.rope_fields import Rope

OUTPUT_NORM_WEIGHTS = WeightMap(
    (
        *EMBEDDINGS,
        *norm("layers.{i}.attention_post_norm", f"{LAYER}.post_attention_layernorm"),
        *norm("layers.{i}.mlp_post_norm", f"{LAYER}.post_feedforward_layernorm"),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
    ),
    IGNORED,
)
OLMO2_FIELDS = (
    *sizes(),
    Field("rms_norm_eps", "norm_eps", float, 1e-5),
    ActivationField(),
    Field("attention_bias", ALL_BIASES, bool, False),
)
OLMO2_TRAITS = {"norm_placement": "output", "qk_norm": "whole"}

OLMO2 = Policy(
    name="olmo2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    weights=OUTPUT_NORM_WEIGHTS,
    config=(*OLMO2_FIELDS, Rope()),
    traits=OLMO2_TRAITS,
)
