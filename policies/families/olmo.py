"""OLMo: Llama with norms that have no parameters, and clipped queries, keys and values."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import ActivationField, Field, Nullable, sizes
from policies.rope_fields import Rope

OLMO = Policy(
    name="olmo",
    model_types=("olmo",),
    architecture="OlmoForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *sizes(),
        ActivationField(),
        Rope(),
        Field("attention_bias", ALL_BIASES, bool, False),
        Nullable("clip_qkv", "clip_qkv", float, None),
    ),
    # No field says the epsilon; transformers' code does.
    traits={"norm": "layer", "norm_scale": False, "norm_eps": 1e-5},
)
