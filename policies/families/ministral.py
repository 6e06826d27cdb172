"""Ministral: Mistral with windows on the layers that the file lists."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

MINISTRAL = Policy(
    name="ministral",
    model_types=("ministral",),
    architecture="MinistralForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        # transformers would take 8 for an absent num_key_value_heads.
        *sizes(kv_heads=REQUIRED),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(),
        Windows(default=4096),
    ),
    fixed={"attention_bias": False, "mlp_bias": False},
)
