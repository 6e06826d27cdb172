"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions are counted from the row after that of padding.

A padding token inside of a text is counted like any other, where transformers would leave it out.
"""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from policies.base import Policy
from policies.encoder import HARMLESS, POST_NORM, TEXT, sizes
from policies.families.bert import bert_weights
from policies.fields import ActivationField, Custom, Field, field


def _read_positions(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    rows, offset = field(raw, "max_position_embeddings", int), field(raw, "pad_token_id", int, 1) + 1
    return {"learned_positions": rows, "position_offset": offset, "max_context": rows - offset}


def _write_positions(config: ModelConfig) -> dict[str, Any]:
    return {"max_position_embeddings": config.learned_positions, "pad_token_id": config.position_offset - 1}


ROBERTA = Policy(
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    architecture="RobertaModel",
    weights=bert_weights("roberta.", (r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*")),
    config=(
        *sizes(),
        *TEXT,
        ActivationField(default="gelu"),
        Field("layer_norm_eps", "norm_eps", float, 1e-12),
        Custom(("max_position_embeddings", "pad_token_id"), _read_positions, _write_positions),
        Field("type_vocab_size", "token_types", default=2),
        Field("is_decoder", "causal", bool, False),
    ),
    traits={**POST_NORM, "pooler": "tanh"},
    harmless=HARMLESS,
    fixed={"position_embedding_type": "absolute"},
    example={"learned_positions": 1, "token_types": 1},
)
