"""OPT: GPT-2's layout under other names; the 350M norms after each half of a layer and has a narrower embedding."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import ActivationField, Custom, Derived, Field, field
from policies.gpt import BIASES, EQUAL_HEADS, HARMLESS, TRAITS, gpt_sizes

_DECODER = "model.decoder"
_LAYER = f"{_DECODER}.layers.{{i}}"


def _norm(part: str, tensor: str) -> tuple[Entry, ...]:
    """Entries of a norm that is before or after its half of a layer, under one name."""
    places = (f"layers.{{i}}.{part}_norm", f"layers.{{i}}.{part}_post_norm")
    return tuple(
        Entry(tuple(f"{place}.{leaf}" for place in places), f"{_LAYER}.{tensor}.{kind}")
        for leaf, kind in (("scale", "weight"), ("bias", "bias"))
    )


def _read_norms(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    before = field(raw, "do_layer_norm_before", bool, True)
    removed = field(raw, "_remove_final_layer_norm", bool, False)
    return {"norm_placement": "pre" if before else "post", "final_norm": before and not removed}


def _write_norms(config: ModelConfig) -> dict[str, Any]:
    before = config.norm_placement == "pre"
    return {"do_layer_norm_before": before, "_remove_final_layer_norm": before and not config.final_norm}


def _read_embedding(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    size = field(raw, "word_embed_proj_dim", int, known["hidden_size"])
    return {"embed_size": None if size == known["hidden_size"] else size}


OPT = Policy(
    name="opt",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", f"{_DECODER}.embed_tokens.weight"),
            Entry("embed_in.weight", f"{_DECODER}.project_in.weight"),
            Entry("positions.weight", f"{_DECODER}.embed_positions.weight"),
            *norm("final_norm", f"{_DECODER}.final_layer_norm"),
            Entry("embed_out.weight", f"{_DECODER}.project_out.weight"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            *_norm("attention", "self_attn_layer_norm"),
            *_norm("mlp", "final_layer_norm"),
            *(
                entry
                for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}.items()
                for entry in each(KINDS, f"layers.{{i}}.attention.{leaf}", f"{_LAYER}.self_attn.{tensor}")
            ),
            *each(KINDS, "layers.{i}.mlp.up", f"{_LAYER}.fc1"),
            *each(KINDS, "layers.{i}.mlp.down", f"{_LAYER}.fc2"),
        ),
        prefix="model.",
    ),
    config=(
        *gpt_sizes(hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads"),
        EQUAL_HEADS,
        Field("max_position_embeddings", "max_context"),
        # Two rows stand before that of position 0.
        Derived("learned_positions", lambda raw, known: known["max_context"] + 2),
        Field("ffn_dim", "intermediate_size"),
        ActivationField("activation_function", "relu"),
        Custom(("do_layer_norm_before", "_remove_final_layer_norm"), _read_norms, _write_norms),
        Custom(("word_embed_proj_dim",), _read_embedding, lambda config: {"word_embed_proj_dim": config.embed_dim}),
        Field("enable_bias", BIASES, bool, True),
        Field("layer_norm_elementwise_affine", ("norm_scale", "norm_bias"), bool, True),
    ),
    traits={**TRAITS, "norm_eps": 1e-5, "rotary_dim": 0, "position_offset": 2},
    harmless=HARMLESS,
    fixed={"learned_embeddings": True, "output_projection": True, "scale_embeddings": False},
)
