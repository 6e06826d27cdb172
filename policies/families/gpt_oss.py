"""gpt-oss: attention sinks, windows in every other layer, and experts with biases and a clamped SwiGLU."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from policies.base import Entry, Policy, each
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS, KINDS, LAYER, RMS_EPS
from policies.expert_maps import EXAMPLE, ROUTER_LOSS
from policies.fields import REQUIRED, Field, sizes
from policies.ops import Alternating, Transposed
from policies.rope_fields import Rope
from policies.window_fields import Windows

# What transformers takes for a file without rotary fields.
_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


@dataclasses.dataclass(frozen=True)
class _GptOssRope(Rope):
    """Rotary fields, with yarn where a file has none."""

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        given = raw.get("rope_scaling") or raw.get("rope_parameters")
        return super().read(raw if given else {**raw, "rope_scaling": _YARN}, known)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        return written | {"rope_scaling": written["rope_scaling"] or {"rope_type": "default"}}


class _GptOssWindows(Windows):
    """Windows, with a size even where no layer has one: transformers can not do without."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        return written | {"sliding_window": written["sliding_window"] or self.default}


_EXPERTS = "layers.{i}.mlp.experts"

GPT_OSS = Policy(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    weights=dataclasses.replace(
        DECODER_WEIGHTS,
        entries=(
            *DECODER_WEIGHTS.entries,
            Entry("layers.{i}.attention.sinks", f"{LAYER}.self_attn.sinks"),
            *each(KINDS, "layers.{i}.mlp.router", f"{LAYER}.mlp.router"),
            # Rows of gate and up alternate; weights are [in, out].
            Entry(
                (f"{_EXPERTS}.gate.weight", f"{_EXPERTS}.up.weight"),
                f"{LAYER}.mlp.experts.gate_up_proj",
                Transposed(Alternating(axis=-2)),
            ),
            Entry(
                (f"{_EXPERTS}.gate.bias", f"{_EXPERTS}.up.bias"),
                f"{LAYER}.mlp.experts.gate_up_proj_bias",
                Alternating(axis=-1),
            ),
            Entry(f"{_EXPERTS}.down.weight", f"{LAYER}.mlp.experts.down_proj", Transposed()),
            Entry(f"{_EXPERTS}.down.bias", f"{LAYER}.mlp.experts.down_proj_bias"),
        ),
    ),
    config=(
        # For absent fields transformers would take 8 and 64, where Llama takes what follows from the others.
        *sizes(kv_heads=REQUIRED, head_dim=REQUIRED),
        RMS_EPS,
        _GptOssRope(theta=150000.0),
        _GptOssWindows(has_window=lambda raw, index: index % 2 == 0, default=128),
        Field("attention_bias", ALL_BIASES, bool, True),
        Field("num_local_experts", "experts.count"),
        Field("num_experts_per_tok", "experts.per_token"),
        Field("intermediate_size", "experts.size"),
    ),
    traits={"sinks": True, "activation": "clamped_swiglu", "experts.bias": True, "experts.router_bias": True},
    # Two names of what other fields say already.
    harmless=ROUTER_LOSS | {"experts_per_token", "initial_context_length"},
    # hidden_act names the SiLU that the clamped SwiGLU is made of.
    fixed={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    example=EXAMPLE,
)
