"""What the encoder families share: fields of config.json, and parts that their checkpoints may or may not have."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from policies.base import Entry, each
from policies.decoder import KINDS
from policies.fields import REQUIRED, TOKEN_IDS, Codec, Custom, Field, default_head_dim

# Heads of tasks (masked tokens, classes, answers) are not loaded: an encoder gives hidden states and pooled vectors.
TRAITS: Mapping[str, Any] = MappingProxyType(
    {
        "causal": False,
        "lm_head": False,
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    }
)
# BERT and its descendants norm each sum, and add rows of a table for positions.
POST_NORM = MappingProxyType(
    {**TRAITS, "norm_placement": "post", "final_norm": False, "embed_norm": True, "rotary_dim": 0}
)
HARMLESS = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "gradient_checkpointing",
        "output_past",
        "tie_word_embeddings",
    }
)

# transformers' encoders have no field for the size of a head.
HEAD_DIM = Custom((), lambda raw, known: {"head_dim": default_head_dim(raw, known)}, lambda config: {})


def sizes(
    hidden: str = "hidden_size",
    intermediate: str = "intermediate_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    defaults: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Codec, ...]:
    """Sizes, under the names that a family has for them, with their defaults."""
    places: dict[str, str | tuple[str, ...]] = {
        hidden: "hidden_size",
        intermediate: "intermediate_size",
        layers: "num_layers",
        heads: ("num_heads", "num_kv_heads"),
    }
    fields = (Field(name, into, default=defaults.get(name, REQUIRED)) for name, into in places.items())
    return Field("model_type", "model_type", str), *fields, HEAD_DIM


TEXT = (Field("vocab_size", "vocab_size"), TOKEN_IDS)


def modules(pairs: Mapping[str, str], leaf: str = "layers.{i}.", tensor: str = "") -> tuple[Entry, ...]:
    """Entries of affine layers, by leaf and tensor."""
    return tuple(entry for to, name in pairs.items() for entry in each(KINDS, leaf + to, tensor + name))
