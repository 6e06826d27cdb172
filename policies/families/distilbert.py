"""DistilBERT: BERT without segments and pooler, under names of its own."""

from policies.base import Entry, Policy, WeightMap
from policies.decoder import norm
from policies.encoder import HARMLESS, POST_NORM, TEXT, modules, sizes
from policies.fields import ActivationField, Field

_LAYER = "distilbert.transformer.layer.{i}."
_MODULES = {
    "attention.q": "attention.q_lin",
    "attention.k": "attention.k_lin",
    "attention.v": "attention.v_lin",
    "attention.out": "attention.out_lin",
    "mlp.up": "ffn.lin1",
    "mlp.down": "ffn.lin2",
}

DISTILBERT = Policy(
    name="distilbert",
    model_types=("distilbert",),
    architecture="DistilBertModel",
    weights=WeightMap(
        (
            Entry("embed.weight", "distilbert.embeddings.word_embeddings.weight"),
            Entry("positions.weight", "distilbert.embeddings.position_embeddings.weight"),
            *norm("embed_norm", "distilbert.embeddings.LayerNorm"),
            *modules(_MODULES, tensor=_LAYER),
            *norm("layers.{i}.attention_post_norm", f"{_LAYER}sa_layer_norm"),
            *norm("layers.{i}.mlp_post_norm", f"{_LAYER}output_layer_norm"),
        ),
        ignored=(
            r"embeddings\.position_ids",
            r"vocab_(transform|layer_norm|projector)\..*",
            r"(pre_)?classifier\..*",
            r"qa_outputs\..*",
        ),
        prefix="distilbert.",
    ),
    config=(
        *sizes("dim", "hidden_dim", "n_layers", "n_heads"),
        *TEXT,
        ActivationField("activation", "gelu"),
        Field("max_position_embeddings", ("max_context", "learned_positions")),
    ),
    traits={**POST_NORM, "norm_eps": 1e-12},
    # Sinusoidal positions are rows of the table like any others.
    harmless=HARMLESS | {"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"},
    example={"learned_positions": 1},
)
