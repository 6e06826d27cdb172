"""EXAONE 4: norms after attention and feed-forward, normed queries and keys, and rotation in layers with a window only.

A model that has no window anywhere (the 1.2B) rotates in every layer.
"""

from policies.base import Policy
from policies.families.olmo2 import OUTPUT_NORM_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Field, field, sizes
from policies.rope_fields import Rope
from policies.window_fields import RotaryWindows

EXAONE4 = Policy(
    name="exaone4",
    model_types=("exaone4",),
    architecture="Exaone4ForCausalLM",
    weights=OUTPUT_NORM_WEIGHTS,
    config=(
        # transformers would take 32 for an absent num_key_value_heads.
        *sizes(kv_heads=REQUIRED),
        Field("rms_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(),
        Rope(),
        RotaryWindows(
            # Published files also give a pattern of letters, always beside a list of the layers.
            has_window=lambda raw, index: (index + 1) % field(raw, "sliding_window_pattern", int, 4) != 0,
            default=4096,
            reads=frozenset({"sliding_window_pattern"}),
            rotates_without=True,
        ),
    ),
    traits={"norm_placement": "output", "qk_norm": "head"},
)
