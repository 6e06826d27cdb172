"""MPT: ALiBi, no biases at all, clipped projections."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.alibi import alibi_bias_max, alibi_slopes
from policies.base import HARMLESS_FIELDS, Entry, Policy, WeightMap, each
from policies.decoder import norm
from policies.fields import Custom, Field, field
from policies.gpt import EQUAL_HEADS, HARMLESS, LAYER_NORM_EPSILON, TRAITS, fused_qkv, gpt_sizes
from policies.ops import Join

_BLOCK = "transformer.blocks.{i}"
_READ = {"alibi_bias_max", "clip_qkv", "softmax_scale"}
_HARMLESS = HARMLESS_FIELDS | {"attn_impl"}
_FIXED = {
    "alibi": True,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "is_encoder_decoder": False,
    "prefix_lm": False,
    "qk_ln": False,
}


def _read_attention(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    values = field(raw, "attn_config", dict, {})
    for name, value in values.items():
        if value is None or name in _READ or name in _HARMLESS:
            continue
        if name not in _FIXED or value != _FIXED[name]:
            raise ConfigError(f"config field attn_config.{name}={value!r} is not supported")
    return {
        "alibi_slopes": alibi_slopes(known["num_heads"], field(values, "alibi_bias_max", float, 8.0)),
        "attention_scale": field(values, "softmax_scale", float, None),
        "clip_qkv": field(values, "clip_qkv", float, None) or None,
    }


def _write_attention(config: ModelConfig) -> dict[str, Any]:
    return {
        "attn_config": {
            "alibi": bool(config.alibi_slopes),
            "alibi_bias_max": alibi_bias_max(config.alibi_slopes) if config.alibi_slopes else None,
            "clip_qkv": config.clip_qkv,
            "softmax_scale": config.attention_scale,
        }
    }


MPT = Policy(
    name="mpt",
    model_types=("mpt",),
    architecture="MptForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "transformer.wte.weight"),
            *norm("final_norm", "transformer.norm_f"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            *norm("layers.{i}.attention_norm", f"{_BLOCK}.norm_1"),
            *norm("layers.{i}.mlp_norm", f"{_BLOCK}.norm_2"),
            *fused_qkv(f"{_BLOCK}.attn.Wqkv", Join()),
            *each(("weight",), "layers.{i}.attention.out", f"{_BLOCK}.attn.out_proj"),
            *each(("weight",), "layers.{i}.mlp.up", f"{_BLOCK}.ffn.up_proj"),
            *each(("weight",), "layers.{i}.mlp.down", f"{_BLOCK}.ffn.down_proj"),
        ),
        prefix="transformer.",
    ),
    config=(
        *gpt_sizes(hidden="d_model", layers="n_layers", heads="n_heads"),
        EQUAL_HEADS,
        Field("max_seq_len", "max_context"),
        Custom(
            ("expansion_ratio",),
            lambda raw, known: {"intermediate_size": field(raw, "expansion_ratio", int, 4) * known["hidden_size"]},
            lambda config: {"expansion_ratio": config.intermediate_size // config.hidden_size},
        ),
        LAYER_NORM_EPSILON,
        Custom(("attn_config",), _read_attention, _write_attention),
    ),
    traits={**TRAITS, "norm_bias": False, "activation": "gelu", "rotary_dim": 0},
    # Positions are learned only without ALiBi; `embedding_fraction` scales gradients.
    harmless=HARMLESS
    | {"embedding_fraction", "init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose"},
    fixed={"no_bias": True, "norm_type": "low_precision_layernorm"},
)
