"""Mistral: Llama without biases, with one sliding window for all layers."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS, RMS_EPS
from policies.fields import REQUIRED, ActivationField, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

# transformers would take 8 for an absent num_key_value_heads, where Llama takes the number of query heads.
MISTRAL = Policy(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(*sizes(kv_heads=REQUIRED), RMS_EPS, Rope(), ActivationField(), Windows(default=4096, lists_types=False)),
    fixed={"attention_bias": False, "mlp_bias": False},
)
