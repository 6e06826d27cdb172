"""GLM-4 of 2024: gate and up as one tensor, half of each head rotated in neighbouring pairs."""

from policies.base import Policy, WeightMap
from policies.decoder import ATTENTION, EMBEDDINGS, FUSED_MLP, IGNORED, NORMS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope

GLM_FIELDS = (
    # transformers would take sizes of a 9B model for absent fields.
    *sizes(kv_heads=REQUIRED, head_dim=REQUIRED),
    Field("rms_norm_eps", "norm_eps", float, 1.5625e-7),
    ActivationField(),
    Rope(partial=0.5),
    # Of q, k and v alone.
    Field("attention_bias", "attention_bias", bool, True),
)

GLM = Policy(
    name="glm",
    model_types=("glm",),
    architecture="GlmForCausalLM",
    weights=WeightMap((*EMBEDDINGS, *NORMS, *ATTENTION, *FUSED_MLP), IGNORED),
    config=GLM_FIELDS,
    traits={"rotary_interleaved": True},
)
