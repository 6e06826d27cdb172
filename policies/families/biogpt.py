"""BioGPT: OPT with embeddings that are scaled."""

import math
from collections.abc import Mapping
from typing import Any

from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import ActivationField, Custom, Derived, Field, field
from policies.gpt import BIASES, EQUAL_HEADS, HARMLESS, TRAITS, gpt_sizes

_LAYER = "biogpt.layers.{i}"


def _read_scale(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    scaled = field(raw, "scale_embedding", bool, True)
    return {"embed_scale": math.sqrt(known["hidden_size"]) if scaled else 1.0}


BIOGPT = Policy(
    name="biogpt",
    model_types=("biogpt",),
    architecture="BioGptForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "biogpt.embed_tokens.weight"),
            Entry("positions.weight", "biogpt.embed_positions.weight"),
            *norm("final_norm", "biogpt.layer_norm"),
            Entry("head.weight", "output_projection.weight", redundant=True),
            *norm("layers.{i}.attention_norm", f"{_LAYER}.self_attn_layer_norm"),
            *norm("layers.{i}.mlp_norm", f"{_LAYER}.final_layer_norm"),
            *(
                entry
                for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}.items()
                for entry in each(KINDS, f"layers.{{i}}.attention.{leaf}", f"{_LAYER}.self_attn.{tensor}")
            ),
            *each(KINDS, "layers.{i}.mlp.up", f"{_LAYER}.fc1"),
            *each(KINDS, "layers.{i}.mlp.down", f"{_LAYER}.fc2"),
        ),
        prefix="biogpt.",
    ),
    config=(
        *gpt_sizes(hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads"),
        EQUAL_HEADS,
        Field("max_position_embeddings", "max_context"),
        # Two rows stand before that of position 0.
        Derived("learned_positions", lambda raw, known: known["max_context"] + 2),
        Field("intermediate_size", "intermediate_size"),
        ActivationField(default="gelu"),
        Custom(("scale_embedding",), _read_scale, lambda config: {"scale_embedding": config.embed_scale != 1.0}),
    ),
    traits={
        **TRAITS,
        **dict.fromkeys(BIASES, True),
        "norm_eps": 1e-5,
        "rotary_dim": 0,
        "position_offset": 2,
    },
    # transformers norms with 1e-5, whatever layer_norm_eps says.
    harmless=HARMLESS | {"attention_probs_dropout_prob", "layer_norm_eps"},
)
