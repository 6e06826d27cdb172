"""GPT-J: attention and feed-forward side by side behind one norm, rotation of neighbouring dimensions."""

from policies.base import Policy, each
from policies.fields import ActivationField, Field
from policies.gpt import (
    BLOCK,
    EQUAL_HEADS,
    GPT_CONTEXT,
    GPT_INNER,
    HARMLESS,
    LAYER_NORM_EPSILON,
    TRAITS,
    gpt_sizes,
    gpt_weights,
)

GPTJ_CONFIG = (
    *gpt_sizes(tied=False),
    GPT_CONTEXT,
    GPT_INNER,
    LAYER_NORM_EPSILON,
    ActivationField("activation_function", "gelu_new"),
    Field("rotary_dim", "rotary_dim"),
)
GPTJ_TRAITS = {
    **TRAITS,
    "mlp_bias": True,
    "head_bias": True,
    "parallel_block": True,
    "shared_norm": True,
    "rotary_interleaved": True,
}
# transformers' classes know neither field.
GPTJ_FIXED = {"scale_attn_weights": True, "rotary": True}

GPTJ = Policy(
    name="gptj",
    model_types=("gptj",),
    architecture="GPTJForCausalLM",
    weights=gpt_weights(
        *(
            entry
            for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}.items()
            for entry in each(("weight",), f"layers.{{i}}.attention.{leaf}", f"{BLOCK}.attn.{tensor}")
        ),
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    config=(*GPTJ_CONFIG, EQUAL_HEADS),
    traits=GPTJ_TRAITS,
    harmless=HARMLESS,
    fixed=GPTJ_FIXED,
)
