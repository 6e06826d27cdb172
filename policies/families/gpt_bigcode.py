"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key head, and weights that are stored `[out, in]`."""

from policies.base import Policy, each
from policies.decoder import KINDS
from policies.fields import ActivationField, Custom, field
from policies.gpt import (
    BIASES,
    BLOCK,
    GPT_CONTEXT,
    GPT_INNER,
    GPT_POSITIONS,
    HARMLESS,
    LAYER_NORM_EPSILON,
    SCALED,
    TRAITS,
    fused_qkv,
    gpt_sizes,
    gpt_weights,
)
from policies.ops import Grouped

GPT_BIGCODE = Policy(
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    architecture="GPTBigCodeForCausalLM",
    weights=gpt_weights(
        *fused_qkv(f"{BLOCK}.attn.c_attn", Grouped()),
        *each(KINDS, "layers.{i}.attention.out", f"{BLOCK}.attn.c_proj"),
    ),
    config=(
        *gpt_sizes(),
        Custom(
            ("multi_query",),
            lambda raw, known: {"num_kv_heads": 1 if field(raw, "multi_query", bool, True) else known["num_heads"]},
            lambda config: {"multi_query": config.num_kv_heads == 1},
        ),
        GPT_CONTEXT,
        GPT_POSITIONS,
        GPT_INNER,
        LAYER_NORM_EPSILON,
        ActivationField("activation_function", "gelu_pytorch_tanh"),
        SCALED,
    ),
    traits={**TRAITS, **dict.fromkeys(BIASES, True), "rotary_dim": 0},
    # Precision of the softmax, which is float32 here, settings of serving code, and what multi_query says already.
    harmless=HARMLESS
    | {
        "attention_softmax_in_fp32",
        "inference_runner",
        "max_batch_size",
        "max_sequence_length",
        "num_key_value_heads",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "scale_attention_softmax_in_fp32",
        "validate_runner_input",
    },
)
