"""Cohere 2: Command R7B and A. Three layers of four have a window, and only those rotate queries and keys."""

from policies.base import Policy
from policies.decoder import DECODER_WEIGHTS
from policies.families.cohere import COHERE_FIELDS, COHERE_FIXED, COHERE_HARMLESS, COHERE_TRAITS
from policies.fields import field
from policies.rope_fields import Rope
from policies.window_fields import RotaryWindows

COHERE2 = Policy(
    name="cohere2",
    model_types=("cohere2",),
    architecture="Cohere2ForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *COHERE_FIELDS,
        Rope(),
        RotaryWindows(
            has_window=lambda raw, index: (index + 1) % field(raw, "sliding_window_pattern", int, 4) != 0,
            default=4096,
            reads=frozenset({"sliding_window_pattern"}),
        ),
    ),
    traits=COHERE_TRAITS,
    # transformers reads sliding_window_pattern instead, which published files give the same value.
    harmless=COHERE_HARMLESS | {"layer_switch"},
    fixed={**COHERE_FIXED, "order_of_interleaved_layers": "local_attn_first", "use_qk_norm": False},
)
