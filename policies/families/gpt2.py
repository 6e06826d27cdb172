"""GPT-2: learned positions, a norm before each half of a layer, and weights that are stored `[in, out]`."""

from policies.base import Policy, each
from policies.decoder import KINDS
from policies.fields import ActivationField, Field
from policies.gpt import (
    BIASES,
    BLOCK,
    EQUAL_HEADS,
    GPT_CONTEXT,
    GPT_INNER,
    GPT_POSITIONS,
    HARMLESS,
    LAYER_NORM_EPSILON,
    SCALED,
    TRAITS,
    fused_qkv,
    gpt_sizes,
    gpt_weights,
)
from policies.ops import Join, Transposed

GPT2 = Policy(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    weights=gpt_weights(
        *fused_qkv(f"{BLOCK}.attn.c_attn", Transposed(Join())),
        *each(KINDS, "layers.{i}.attention.out", f"{BLOCK}.attn.c_proj", Transposed()),
        linear=Transposed(),
    ),
    config=(
        *gpt_sizes(),
        EQUAL_HEADS,
        GPT_CONTEXT,
        GPT_POSITIONS,
        GPT_INNER,
        LAYER_NORM_EPSILON,
        ActivationField("activation_function", "gelu_new"),
        SCALED,
        Field("scale_attn_by_inverse_layer_idx", "inverse_layer_scale", bool, False),
    ),
    traits={**TRAITS, **dict.fromkeys(BIASES, True), "rotary_dim": 0},
    # Another order of rounding; scores are always in float32 here.
    harmless=HARMLESS | {"reorder_and_upcast_attn"},
)
