"""Qwen3: Qwen2 with a norm of each head of q and k in place of the biases, and a head size of its own."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, RMS_EPS
from policies.families.qwen2 import QWEN_WINDOWS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope

QWEN3 = Policy(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        # For absent fields transformers would take 32 and 128, where Llama takes what follows from the others.
        *sizes(kv_heads=REQUIRED, head_dim=REQUIRED),
        RMS_EPS,
        Rope(),
        ActivationField(),
        QWEN_WINDOWS,
        # Off in every published checkpoint; transformers gives the output projection a bias too.
        Field("attention_bias", ALL_BIASES, bool, False),
    ),
    traits={"qk_norm": "head"},
)
