"""ModernBERT (arXiv 2412.13663): pre-norm encoder with rotation, gates, and windows on two layers of three."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import ALL_BIASES, KINDS, norm
from policies.encoder import HARMLESS, TEXT, TRAITS, sizes
from policies.fields import ActivationField, Custom, Field, field
from policies.ops import Join
from policies.rope_fields import Rope
from policies.window_fields import LAYER_TYPES

_LAYER = "model.layers.{i}"
_WEIGHTS = WeightMap(
    (
        Entry("embed.weight", "model.embeddings.tok_embeddings.weight"),
        *norm("embed_norm", "model.embeddings.norm"),
        *norm("layers.{i}.attention_norm", f"{_LAYER}.attn_norm"),
        *(
            Entry(
                tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in "qkv"), f"{_LAYER}.attn.Wqkv.{kind}", Join()
            )
            for kind in KINDS
        ),
        *each(KINDS, "layers.{i}.attention.out", f"{_LAYER}.attn.Wo"),
        *norm("layers.{i}.mlp_norm", f"{_LAYER}.mlp_norm"),
        *(
            Entry(
                tuple(f"layers.{{i}}.mlp.{part}.{kind}" for part in ("gate", "up")), f"{_LAYER}.mlp.Wi.{kind}", Join()
            )
            for kind in KINDS
        ),
        *each(KINDS, "layers.{i}.mlp.down", f"{_LAYER}.mlp.Wo"),
        *norm("final_norm", "model.final_norm"),
    ),
    ignored=(r"head\..*", r"decoder\..*", r"classifier\..*", r"qa_outputs\..*"),
    prefix="model.",
)


def _read_windows(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`local_attention` is the width of a window that reaches half of it to either side; a query sees both ends."""
    layers, every = known["num_layers"], field(raw, "global_attn_every_n_layers", int, 3)
    types = field(raw, "layer_types", list, [LAYER_TYPES[bool(i % every)] for i in range(layers)])
    if len(types) != layers or not set(types) <= set(LAYER_TYPES):
        raise ConfigError(f"layer_types must name {layers} layers, each {' or '.join(LAYER_TYPES)}, not {types}")
    window = field(raw, "local_attention", int, 128) // 2 + 1
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return {"windows": windows if any(windows) else ()}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "layer_types": [LAYER_TYPES[config.window(i) is not None] for i in range(config.num_layers)],
        # transformers' default is an id that a smaller vocabulary lacks; it matters in training only.
        "pad_token_id": None,
    }
    for window in filter(None, config.windows):
        written["local_attention"] = 2 * (window - 1)
    return written


def _refuse_scaling(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    if known["rope_scaling"] is not None:
        raise ConfigError(f"rope scaling ({known['rope_scaling'].kind}) is not supported for modernbert")
    return {}


MODERNBERT = Policy(
    name="modernbert",
    model_types=("modernbert",),
    architecture="ModernBertModel",
    weights=_WEIGHTS,
    config=(
        *sizes(),
        *TEXT,
        ActivationField("hidden_activation", "gelu"),
        Field("norm_eps", "norm_eps", float, 1e-5),
        Field("norm_bias", "norm_bias", bool, False),
        Field("attention_bias", ALL_BIASES, bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
        Field("max_position_embeddings", "max_context"),
        Custom(("local_attention", "layer_types", "global_attn_every_n_layers"), _read_windows, _write_windows),
        Rope(theta=160000.0, theta_name="global_rope_theta", local="local_rope_theta"),
        Custom((), _refuse_scaling, lambda config: {}),
    ),
    traits={**TRAITS, "gated": True, "first_norm": False, "embed_norm": True},
    harmless=HARMLESS
    | {"classifier_activation", "classifier_bias", "classifier_pooling", "cls_token_id", "decoder_bias"}
    | {"deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor", "layer_norm_eps", "mlp_dropout"}
    | {"position_embedding_type", "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index"}
    | {"sparse_prediction"},
    example={"norm_bias": True},
)
