"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window on the upper layers when switched on."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS, RMS_EPS
from policies.fields import REQUIRED, ActivationField, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

# Layers below max_window_layers attend to everything; 28 is what transformers takes for an absent field.
QWEN_WINDOWS = Windows(
    has_window=lambda raw, index: index >= field(raw, "max_window_layers", int, 28),
    switch="use_sliding_window",
    default=4096,
    reads=frozenset({"max_window_layers"}),
)

QWEN2 = Policy(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    weights=DECODER_WEIGHTS,
    # transformers would take 32 for an absent num_key_value_heads, where Llama takes the number of query heads.
    config=(*sizes(kv_heads=REQUIRED), RMS_EPS, Rope(), ActivationField(), QWEN_WINDOWS),
    traits={"attention_bias": True},
    fixed={"use_mrope": False},
)
