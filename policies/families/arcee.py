"""Arcee's AFM: Llama with a plain feed-forward layer of squared ReLU."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import ActivationField, Field, sizes
from policies.rope_fields import Rope

ARCEE = Policy(
    name="arcee",
    model_types=("arcee",),
    architecture="ArceeForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(default="relu2"),
        Rope(),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    traits={"gated": False},
)
