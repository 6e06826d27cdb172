"""Qwen (the first): Qwen2 with one key head for each query head, q, k and v as one tensor, and other names.

Its dynamic NTK scaling and its log-n scaling of queries act only on texts longer than `seq_length`. That is the longest
text here (`max_context`), so neither is ever active, whether switched on or not.
"""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import KINDS
from policies.fields import TOKEN_IDS, Custom, Field, default_head_dim, field
from policies.ops import Join
from policies.rope_fields import Rope

_LAYER = "transformer.h.{i}"
_QKV = tuple(
    Entry(tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in "qkv"), f"{_LAYER}.attn.c_attn.{kind}", Join())
    for kind in KINDS
)


def _read_width(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The field counts gate and up together."""
    both = field(raw, "intermediate_size", int)
    if both % 2:
        raise ConfigError(f"intermediate_size={both} counts gate and up together and must be even")
    return {"intermediate_size": both // 2}


def _write_context(config: ModelConfig) -> dict[str, Any]:
    return {"seq_length": config.max_context, "max_position_embeddings": config.max_context}


QWEN = Policy(
    name="qwen",
    model_types=("qwen",),
    architecture="QWenLMHeadModel",
    weights=WeightMap(
        (
            Entry("embed.weight", "transformer.wte.weight"),
            Entry("final_norm.scale", "transformer.ln_f.weight"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            Entry("layers.{i}.attention_norm.scale", f"{_LAYER}.ln_1.weight"),
            Entry("layers.{i}.mlp_norm.scale", f"{_LAYER}.ln_2.weight"),
            *_QKV,
            *each(("weight",), "layers.{i}.attention.out", f"{_LAYER}.attn.c_proj"),
            # The activation is on the second projection.
            *each(("weight",), "layers.{i}.mlp.gate", f"{_LAYER}.mlp.w2"),
            *each(("weight",), "layers.{i}.mlp.up", f"{_LAYER}.mlp.w1"),
            *each(("weight",), "layers.{i}.mlp.down", f"{_LAYER}.mlp.c_proj"),
        ),
        ignored=(r"transformer\.rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(masked_bias|logn_tensor)"),
    ),
    config=(
        Field("model_type", "model_type", str),
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "hidden_size"),
        Custom(("intermediate_size",), _read_width, lambda config: {"intermediate_size": 2 * config.intermediate_size}),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", ("num_heads", "num_kv_heads")),
        Field("kv_channels", "head_dim", default=default_head_dim),
        Custom(("seq_length",), lambda raw, known: {"max_context": field(raw, "seq_length", int)}, _write_context),
        Field("layer_norm_epsilon", "norm_eps", float, 1e-6),
        Rope(partial=1.0, theta_name="rotary_emb_base", partial_name="rotary_pct"),
        Field("tie_word_embeddings", "tie_embeddings", bool, False),
        TOKEN_IDS,
    ),
    traits={"attention_bias": True},
    harmless=frozenset(
        {
            "attn_dropout_prob",
            "bf16",
            "emb_dropout_prob",
            "fp16",
            "fp32",
            "max_position_embeddings",
            "onnx_safe",
            "softmax_in_fp32",
            "use_cache_kernel",
            "use_dynamic_ntk",
            "use_flash_attn",
            "use_logn_attn",
        }
    ),
    fixed={"no_bias": True, "scale_attn_weights": True, "use_cache_quantization": False},
)
