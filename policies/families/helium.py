"""Helium: Llama rotated in neighbouring pairs, without a bias on the output of attention."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope

HELIUM = Policy(
    name="helium",
    model_types=("helium",),
    architecture="HeliumForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        # transformers would take sizes of a 2B model for absent fields.
        *sizes(kv_heads=REQUIRED, head_dim=REQUIRED),
        Field("rms_norm_eps", "norm_eps", float, 1e-8),
        ActivationField(),
        Rope(theta=100000.0),
        Field("attention_bias", "attention_bias", bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    traits={"rotary_interleaved": True},
)
