"""Phi-3, Phi-3.5 and Phi-4: Mistral with q, k, v and gate, up as one tensor each, and LongRoPE."""

from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import EMBEDDINGS, FUSED_MLP, IGNORED, KINDS, LAYER, NORMS
from policies.fields import ActivationField, Field, sizes
from policies.ops import Join
from policies.rope_fields import Rope
from policies.window_fields import Windows

_QKV = tuple(f"layers.{{i}}.attention.{part}.weight" for part in "qkv")

PHI3 = Policy(
    name="phi3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    weights=WeightMap(
        (
            *EMBEDDINGS,
            *NORMS,
            Entry(_QKV, f"{LAYER}.self_attn.qkv_proj.weight", Join()),
            *each(KINDS, "layers.{i}.attention.out", f"{LAYER}.self_attn.o_proj"),
            *FUSED_MLP,
        ),
        IGNORED,
    ),
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(),
        Rope(partial=1.0),
        Windows(lists_types=False),
    ),
    fixed={
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
)
