"""Gemma 3, text: Gemma 2 with normed queries and keys in place of the soft caps, and another rotary base in windows."""

from policies.base import Policy
from policies.families.gemma import GEMMA_FIELDS, GEMMA_FIXED
from policies.families.gemma2 import GEMMA2_ACTIVATION, GEMMA2_HARMLESS, GEMMA2_WEIGHTS, QUERY_SCALE
from policies.fields import Nullable, field
from policies.rope_fields import Rope
from policies.window_fields import Windows

# Each sixth layer attends to everything, unless the file says another number or lists the layers.
_WINDOWS = Windows(
    has_window=lambda raw, index: (index + 1) % field(raw, "sliding_window_pattern", int, 6) != 0,
    default=4096,
    reads=frozenset({"sliding_window_pattern"}),
)

GEMMA3_TEXT = Policy(
    name="gemma3_text",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    weights=GEMMA2_WEIGHTS,
    config=(
        *GEMMA_FIELDS,
        GEMMA2_ACTIVATION,
        Rope(theta=1e6, local="rope_local_base_freq"),
        QUERY_SCALE,
        _WINDOWS,
        Nullable("final_logit_softcapping", "logit_soft_cap", float, None),
    ),
    traits={"norm_offset": 1.0, "norm_placement": "both", "qk_norm": "head"},
    # transformers writes the number by which it listed the layers beside the list.
    harmless=GEMMA2_HARMLESS | {"_sliding_window_pattern"},
    # attn_logit_softcapping must be null: transformers does not apply it in this family.
    fixed=GEMMA_FIXED,
)
