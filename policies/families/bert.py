"""BERT: encoder whose layers norm each sum, with segments and a pooler."""

from policies.base import Either, Entry, Policy, WeightMap
from policies.decoder import norm
from policies.encoder import HARMLESS, POST_NORM, TEXT, modules, sizes
from policies.fields import ActivationField, Field

_LAYER = "encoder.layer.{i}."
_MODULES = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
_NORMS = {
    "embed_norm": "embeddings.LayerNorm",
    "layers.{i}.attention_post_norm": f"{_LAYER}attention.output.LayerNorm",
    "layers.{i}.mlp_post_norm": f"{_LAYER}output.LayerNorm",
}


def bert_weights(prefix: str, heads: tuple[str, ...]) -> WeightMap:
    """Tensors of a model that is named like BERT.

    Args:
      prefix: name of the encoder inside of a model with a head.
      heads: patterns of the tensors of heads, which are not loaded.
    """
    tables = {"embed": "word_embeddings", "positions": "position_embeddings", "token_types": "token_type_embeddings"}
    return WeightMap(
        (
            *(Entry(f"{leaf}.weight", f"{prefix}embeddings.{tensor}.weight") for leaf, tensor in tables.items()),
            Either(
                (
                    tuple(entry for leaf, tensor in _NORMS.items() for entry in norm(leaf, prefix + tensor)),
                    # What TensorFlow called them, which the first checkpoints kept.
                    tuple(
                        Entry(f"{leaf}.{kind}", f"{prefix}{tensor}.{name}")
                        for leaf, tensor in _NORMS.items()
                        for kind, name in (("scale", "gamma"), ("bias", "beta"))
                    ),
                )
            ),
            *modules(_MODULES, tensor=prefix + _LAYER),
            *modules({"pooler": "pooler.dense"}, leaf="", tensor=prefix),
        ),
        ignored=(r"embeddings\.position_ids", *heads),
        prefix=prefix,
        optional={"pooler": f"{prefix}pooler.dense.weight"},
    )


BERT = Policy(
    name="bert",
    model_types=("bert",),
    architecture="BertModel",
    weights=bert_weights("bert.", (r"cls\..*", r"classifier\..*", r"qa_outputs\..*")),
    config=(
        *sizes(),
        *TEXT,
        ActivationField(default="gelu"),
        Field("layer_norm_eps", "norm_eps", float, 1e-12),
        Field("max_position_embeddings", ("max_context", "learned_positions")),
        Field("type_vocab_size", "token_types", default=2),
        # A decoder sees what comes before a token alone.
        Field("is_decoder", "causal", bool, False),
    ),
    traits={**POST_NORM, "pooler": "tanh"},
    # The pooler's are those of Google's own releases, where they say what all models do.
    harmless=HARMLESS
    | {"directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"}
    | {"pooler_type"},
    fixed={"position_embedding_type": "absolute"},
    example={"learned_positions": 1, "token_types": 1},
)
