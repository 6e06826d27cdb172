"""DeepSeek-V2 and V3 (and R1, Moonlight): latent attention, many small experts, and some that all tokens pass."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Either, Entry, Policy, WeightMap, each
from policies.decoder import ALL_BIASES, EMBEDDINGS, IGNORED, KINDS, LAYER, MLP, NORMS, RMS_EPS
from policies.expert_maps import (
    CORRECTION,
    DENSE_FIRST,
    EXPERTS,
    ROUTER_LOSS,
    SHARED_COUNT,
    V3_ROUTING,
    V3_TRAITS,
    router,
    shared,
)
from policies.expert_maps import EXAMPLE as EXPERTS_EXAMPLE
from policies.fields import ActivationField, Custom, Field, field
from policies.latent_fields import EXAMPLE as LATENT_EXAMPLE
from policies.latent_fields import LATENT, LatentRope
from policies.ops import Grouped

_LEAF, _TENSOR = "layers.{i}.attention", f"{LAYER}.self_attn"
_QUERIES = Either(
    (
        (
            *each(KINDS, f"{_LEAF}.q_down", f"{_TENSOR}.q_a_proj"),
            Entry(f"{_LEAF}.q_down_norm.scale", f"{_TENSOR}.q_a_layernorm.weight"),
            Entry(f"{_LEAF}.q.weight", f"{_TENSOR}.q_b_proj.weight"),
        ),
        (Entry(f"{_LEAF}.q.weight", f"{_TENSOR}.q_proj.weight"),),
    )
)
_WEIGHTS = WeightMap(
    (
        *EMBEDDINGS,
        *NORMS,
        _QUERIES,
        *each(KINDS, f"{_LEAF}.kv_down", f"{_TENSOR}.kv_a_proj_with_mqa"),
        Entry(f"{_LEAF}.kv_down_norm.scale", f"{_TENSOR}.kv_a_layernorm.weight"),
        # A head's rows for keys, then its rows for values; then the next head.
        Entry((f"{_LEAF}.k_up.weight", f"{_LEAF}.v_up.weight"), f"{_TENSOR}.kv_b_proj.weight", Grouped()),
        *each(KINDS, f"{_LEAF}.out", f"{_TENSOR}.o_proj"),
        *MLP,
        router(f"{LAYER}.mlp.gate.weight"),
        CORRECTION,
        EXPERTS,
        *shared(f"{LAYER}.mlp.shared_experts"),
    ),
    # V3's files hold a 62nd layer, which predicts a second token.
    (*IGNORED, r"model\.layers\.61\..*"),
)


_COMMON = (
    *LATENT,
    RMS_EPS,
    ActivationField(),
    LatentRope(),
    Field("attention_bias", ALL_BIASES, bool, False),
    Field("n_routed_experts", "experts.count"),
    Field("num_experts_per_tok", "experts.per_token"),
    Field("moe_intermediate_size", "experts.size"),
    SHARED_COUNT,
    DENSE_FIRST,
)
# How the model was trained and served, and layers that predict further tokens.
_HARMLESS = ROUTER_LOSS | {"ep_size", "num_nextn_predict_layers", "num_mtp_layers"}
_EXAMPLE = LATENT_EXAMPLE | EXPERTS_EXAMPLE | {"experts.shared_size": 1}

DEEPSEEK_V3 = Policy(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architecture="DeepseekV3ForCausalLM",
    weights=_WEIGHTS,
    config=(
        *_COMMON,
        Field("rope_interleave", "rotary_interleaved", bool, True),
        *V3_ROUTING,
    ),
    traits=V3_TRAITS,
    harmless=_HARMLESS,
    fixed={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    example=_EXAMPLE,
)


def _read_groups(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    method = field(raw, "topk_method", str, "greedy")
    if method == "greedy":
        return {}
    if method != "group_limited_greedy":
        raise ConfigError(f"topk_method={method!r} is not supported; 'greedy' and 'group_limited_greedy' are")
    return {"experts.groups": field(raw, "n_group", int), "experts.groups_per_token": field(raw, "topk_group", int)}


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    if config.experts is None or config.experts.groups == 1:
        return {"topk_method": "greedy", "n_group": None, "topk_group": None}
    groups = {"n_group": config.experts.groups, "topk_group": config.experts.groups_per_token}
    return groups | {"topk_method": "group_limited_greedy"}


DEEPSEEK_V2 = Policy(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    weights=_WEIGHTS,
    config=(
        *_COMMON,
        Custom(("topk_method", "n_group", "topk_group"), _read_groups, _write_groups),
        Field("routed_scaling_factor", "experts.scale", float, 1.0),
        # Of the dense layers and of what all tokens pass.
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    traits={"rotary_interleaved": True, "experts.renormalize": False},
    harmless=_HARMLESS,
    fixed={"moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
    example=_EXAMPLE,
)
