"""Llama, and the many that share its config.json (SmolLM, TinyLlama, Yi, ...)."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER, DECODER_WEIGHTS
from policies.fields import Field

LLAMA = Policy(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    weights=DECODER_WEIGHTS,
    # transformers gives the output projection a bias too, unlike Qwen2.
    config=(
        *DECODER,
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    harmless=frozenset({"is_llama_config", "max_sequence_length"}),
    fixed={"rope_interleaved": False},
)
