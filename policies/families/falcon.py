"""Falcon: a parallel block with one norm (7B) or two (40B and later), or a sequential one with ALiBi (RW)."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.alibi import alibi_slopes
from policies.base import Either, Entry, Policy, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import ActivationField, Custom, Field, field
from policies.gpt import (
    BIASES,
    BLOCK,
    HARMLESS,
    LAYER_NORM_EPSILON,
    TRAITS,
    four_times_hidden,
    fused_qkv,
    gpt_sizes,
)
from policies.ops import Grouped
from policies.rope_fields import Rope


def _norms(first: str, second: str) -> tuple[Entry, ...]:
    return (
        *norm("layers.{i}.attention_norm", f"{BLOCK}.{first}"),
        *norm("layers.{i}.mlp_norm", f"{BLOCK}.{second}"),
    )


def _read_block(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    heads, parallel = known["num_heads"], field(raw, "parallel_attn", bool, True)
    kv_heads = field(raw, "num_kv_heads", int, heads)
    if field(raw, "new_decoder_architecture", bool, False):
        norms = field(raw, "num_ln_in_parallel_attn", int, 2)
        if norms not in (1, 2):
            raise ConfigError(f"num_ln_in_parallel_attn={norms} is not supported; 1 and 2 are")
        if not parallel:
            raise ConfigError("parallel_attn=False is not supported with new_decoder_architecture=True")
        return {"num_kv_heads": kv_heads, "parallel_block": True, "shared_norm": norms == 1}
    if field(raw, "multi_query", bool, True):
        kv_heads = 1
    elif kv_heads != heads:
        raise ConfigError(f"num_kv_heads={kv_heads} is not supported with new_decoder_architecture=False")
    return {"num_kv_heads": kv_heads, "parallel_block": parallel, "shared_norm": parallel}


def _write_block(config: ModelConfig) -> dict[str, Any]:
    few = config.num_kv_heads not in (1, config.num_heads)
    new = config.parallel_block and (few or not config.shared_norm)
    return {
        "new_decoder_architecture": new,
        "multi_query": config.num_kv_heads == 1,
        "num_kv_heads": config.num_kv_heads if new else None,
        "parallel_attn": config.parallel_block,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if new else None,
    }


def _read_alibi(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    if not field(raw, "alibi", bool, False):
        return {}
    # Falcon scales scores after it has added the bias to them.
    scale = known["head_dim"] ** -0.5
    return {"rotary_dim": 0, "alibi_slopes": tuple(slope * scale for slope in alibi_slopes(known["num_heads"]))}


FALCON = Policy(
    name="falcon",
    model_types=("falcon",),
    architecture="FalconForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "transformer.word_embeddings.weight"),
            *norm("final_norm", "transformer.ln_f"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            Either(
                (_norms("ln_attn", "ln_mlp"), _norms("input_layernorm", "post_attention_layernorm")),
                choose=lambda config: 0 if config.parallel_block and not config.shared_norm else 1,
            ),
            *fused_qkv(f"{BLOCK}.self_attention.query_key_value", Grouped()),
            *each(KINDS, "layers.{i}.attention.out", f"{BLOCK}.self_attention.dense"),
            *each(KINDS, "layers.{i}.mlp.up", f"{BLOCK}.mlp.dense_h_to_4h"),
            *each(KINDS, "layers.{i}.mlp.down", f"{BLOCK}.mlp.dense_4h_to_h"),
        ),
        ignored=(r"h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",),
        prefix="transformer.",
    ),
    config=(
        *gpt_sizes(
            hidden="hidden_size",
            layers="num_hidden_layers",
            heads="num_attention_heads",
            hidden_aliases=("n_embed",),
        ),
        Field("max_position_embeddings", "max_context", default=2048),
        Field("ffn_hidden_size", "intermediate_size", default=four_times_hidden),
        LAYER_NORM_EPSILON,
        ActivationField("activation", "gelu"),
        Field("bias", BIASES, bool, False),
        Rope(),
        Custom(
            ("new_decoder_architecture", "multi_query", "num_kv_heads", "parallel_attn", "num_ln_in_parallel_attn"),
            _read_block,
            _write_block,
        ),
        Custom(("alibi",), _read_alibi, lambda config: {"alibi": bool(config.alibi_slopes)}),
    ),
    traits=TRAITS,
    harmless=HARMLESS | {"ff_factor"},
    fixed={"apply_residual_connection_post_layernorm": False},
)
