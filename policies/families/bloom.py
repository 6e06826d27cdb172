"""BLOOM: ALiBi, a norm after the embedding."""

from policies.alibi import alibi_slopes
from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import Derived, Field
from policies.gpt import (
    BIASES,
    BLOCK,
    EQUAL_HEADS,
    HARMLESS,
    LAYER_NORM_EPSILON,
    TRAITS,
    four_times_hidden,
    fused_qkv,
    gpt_sizes,
)
from policies.ops import Grouped

BLOOM = Policy(
    name="bloom",
    model_types=("bloom",),
    architecture="BloomForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "transformer.word_embeddings.weight"),
            *norm("embed_norm", "transformer.word_embeddings_layernorm"),
            *norm("final_norm", "transformer.ln_f"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            *norm("layers.{i}.attention_norm", f"{BLOCK}.input_layernorm"),
            *norm("layers.{i}.mlp_norm", f"{BLOCK}.post_attention_layernorm"),
            *fused_qkv(f"{BLOCK}.self_attention.query_key_value", Grouped()),
            *each(KINDS, "layers.{i}.attention.out", f"{BLOCK}.self_attention.dense"),
            *each(KINDS, "layers.{i}.mlp.up", f"{BLOCK}.mlp.dense_h_to_4h"),
            *each(KINDS, "layers.{i}.mlp.down", f"{BLOCK}.mlp.dense_4h_to_h"),
        ),
        prefix="transformer.",
    ),
    config=(
        *gpt_sizes(hidden="hidden_size", hidden_aliases=("n_embed",)),
        EQUAL_HEADS,
        # ALiBi has no longest text; files name what the model was trained on, if anything.
        Field("seq_length", "max_context", default=2048),
        Derived("intermediate_size", four_times_hidden),
        LAYER_NORM_EPSILON,
        Derived("alibi_slopes", lambda raw, known: alibi_slopes(known["num_heads"])),
    ),
    traits={
        **TRAITS,
        **dict.fromkeys((*BIASES, "embed_norm"), True),
        "activation": "gelu_tanh",
        "rotary_dim": 0,
    },
    # Fused kernels, order of rounding, and names that no code reads.
    harmless=HARMLESS
    | {
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "slow_but_exact",
        "unk_token_id",
    },
    fixed={"apply_residual_connection_post_layernorm": False},
)
