"""Granite: Llama with multipliers of embeddings, attention scores, residual updates and logits."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import ActivationField, Custom, Field, field, sizes
from policies.rope_fields import Rope


def _divisor(scale: float) -> float:
    """What logits are divided by: the whole number, where there is one that gives this scale."""
    divisor = 1 / scale
    return round(divisor) if 1 / max(round(divisor), 1) == scale else divisor


# transformers divides logits by this field.
LOGITS_SCALING = Custom(
    ("logits_scaling",),
    lambda raw, known: {"logit_scale": 1 / field(raw, "logits_scaling", float, 1.0)},
    lambda config: {"logits_scaling": _divisor(config.logit_scale)},
)

GRANITE = Policy(
    name="granite",
    model_types=("granite",),
    architecture="GraniteForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
        Field("embedding_multiplier", "embed_scale", float, 1.0),
        Field("attention_multiplier", "attention_scale", float, 1.0),
        Field("residual_multiplier", "residual_multiplier", float, 1.0),
        LOGITS_SCALING,
    ),
)
