"""What the GPT-like families share: tensor names and fields of config.json."""

from collections.abc import Mapping
from typing import Any

from policies.base import Entry, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import TOKEN_IDS, Codec, Custom, Derived, Field, default_head_dim, field
from policies.ops import Copy, Op

BLOCK = "transformer.h.{i}"
_AS_IT_IS = Copy()
BIASES = ("attention_bias", "attention_out_bias", "mlp_bias")
# LayerNorm, and a feed-forward layer without gates.
TRAITS: Mapping[str, Any] = {"norm": "layer", "norm_bias": True, "gated": False}
# Masks and tables of positions that older releases saved.
BUFFERS = (r"h\.\d+\.attn(\.attention)?\.(bias|masked_bias|causal_mask|embed_positions)",)
# Dropout, heads of other tasks, training, where custom code lies, and what the sizes say already.
HARMLESS = frozenset(
    """
    _num_labels classifier_dropout dropout embed_dropout emb_pdrop gradient_checkpointing init_std layerdrop
    activation_dropout n_ctx resid_dropout summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj
    """.split()
)


def four_times_hidden(raw: Mapping[str, Any], known: Mapping[str, Any]) -> int:
    """The width of the feed-forward layer where the file does not say."""
    return 4 * known["hidden_size"]


def gpt_sizes(
    *,
    hidden: str = "n_embd",
    layers: str = "n_layer",
    heads: str = "n_head",
    hidden_aliases: tuple[str, ...] = (),
    tied: bool = True,
) -> tuple[Codec, ...]:
    """Sizes in a family's own names, with Hugging Face's usual ones as aliases.

    Args:
      hidden: name of the hidden size.
      layers: name of the number of layers.
      heads: name of the number of query heads.
      hidden_aliases: further names of the hidden size.
      tied: default of `tie_word_embeddings`: that of transformers' class.
    """

    def size(name: str, into: str, usual: str, aliases: tuple[str, ...] = ()) -> Field:
        return Field(name, into, aliases=tuple(alias for alias in (usual, *aliases) if alias != name))

    return (
        Field("model_type", "model_type", str),
        Field("vocab_size", "vocab_size"),
        size(hidden, "hidden_size", "hidden_size", hidden_aliases),
        size(layers, "num_layers", "num_hidden_layers"),
        size(heads, "num_heads", "num_attention_heads"),
        Derived("head_dim", default_head_dim),
        Field("tie_word_embeddings", "tie_embeddings", bool, tied),
        TOKEN_IDS,
    )


EQUAL_HEADS = Derived("num_kv_heads", lambda raw, known: known["num_heads"])
LAYER_NORM_EPSILON = Field("layer_norm_epsilon", "norm_eps", float, 1e-5)
# What GPT-2 and those nearest to it have in its names.
GPT_CONTEXT = Field("n_positions", "max_context", aliases=("max_position_embeddings",))
GPT_INNER = Field("n_inner", "intermediate_size", default=four_times_hidden)
GPT_POSITIONS = Derived("learned_positions", lambda raw, known: known["max_context"])
SCALED = Custom(
    ("scale_attn_weights",),
    lambda raw, known: {"attention_scale": None if field(raw, "scale_attn_weights", bool, True) else 1.0},
    lambda config: {"scale_attn_weights": config.attention_scale is None},
)


def fused_qkv(tensor: str, op: Op, parts: str = "qkv") -> tuple[Entry, ...]:
    """Entries of one projection for queries, keys and values.

    Args:
      tensor: its name, without `.weight` and `.bias`.
      op: how their rows lie in it.
      parts: in which order.
    """
    return tuple(
        Entry(tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in parts), f"{tensor}.{kind}", op)
        for kind in KINDS
    )


def gpt_weights(*attention: Entry, up: str = "mlp.c_fc", down: str = "mlp.c_proj", linear: Op = _AS_IT_IS) -> WeightMap:
    """The map of GPT-2's names.

    Args:
      *attention: entries of attention.
      up: name of the feed-forward layer's first projection.
      down: name of its second.
      linear: how both are stored.
    """
    return WeightMap(
        entries=(
            Entry("embed.weight", "transformer.wte.weight"),
            Entry("positions.weight", "transformer.wpe.weight"),
            *norm("final_norm", "transformer.ln_f"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            Entry("head.bias", "lm_head.bias"),
            *norm("layers.{i}.attention_norm", f"{BLOCK}.ln_1"),
            *norm("layers.{i}.mlp_norm", f"{BLOCK}.ln_2"),
            *attention,
            *each(KINDS, "layers.{i}.mlp.up", f"{BLOCK}.{up}", linear),
            *each(KINDS, "layers.{i}.mlp.down", f"{BLOCK}.{down}", linear),
        ),
        ignored=BUFFERS,
        prefix="transformer.",
    )
