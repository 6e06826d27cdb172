"""Seed-OSS: Llama with biases on q, k and v, and a field for each other bias."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope

SEED_OSS = Policy(
    name="seed_oss",
    model_types=("seed_oss",),
    architecture="SeedOssForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        # transformers would take sizes of a 36B model for absent fields.
        *sizes(kv_heads=REQUIRED, head_dim=REQUIRED),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(),
        Field("attention_bias", "attention_bias", bool, True),
        Field("attention_out_bias", "attention_out_bias", bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    harmless=frozenset({"residual_dropout"}),
)
