"""GLM-4 of 2025 (0414) and GLM-Z1: GLM with norms after attention and feed-forward too."""

from policies.base import Policy, WeightMap
from policies.decoder import ATTENTION, EMBEDDINGS, FUSED_MLP, IGNORED, LAYER, NORMS, norm
from policies.families.glm import GLM_FIELDS

GLM4 = Policy(
    name="glm4",
    model_types=("glm4",),
    architecture="Glm4ForCausalLM",
    weights=WeightMap(
        (
            *EMBEDDINGS,
            *NORMS,
            *norm("layers.{i}.attention_post_norm", f"{LAYER}.post_self_attn_layernorm"),
            *norm("layers.{i}.mlp_post_norm", f"{LAYER}.post_mlp_layernorm"),
            *ATTENTION,
            *FUSED_MLP,
        ),
        IGNORED,
    ),
    config=GLM_FIELDS,
    traits={"rotary_interleaved": True, "norm_placement": "both"},
)
