"""Mixtral: Mistral with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from dsjax.config import ModelConfig
from policies.base import Entry, Policy, Stack
from policies.hf_decoder import DECODER_FIELDS, DECODER_WEIGHTS, decoder_config, decoder_fields, field, refuse

_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}
_MODULE = "model.layers.{i}.block_sparse_moe"

_WEIGHTS = dataclasses.replace(
    DECODER_WEIGHTS,
    entries=(
        *DECODER_WEIGHTS.entries,
        Entry("layers.{i}.mlp.router.weight", f"{_MODULE}.gate.weight"),
        *(
            Entry(f"layers.{{i}}.mlp.experts.{leaf}.weight", f"{_MODULE}.experts.{{e}}.{tensor}.weight", Stack())
            for leaf, tensor in _EXPERTS.items()
        ),
    ),
)


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    # transformers would take 8 for an absent field, where Llama takes the number of query heads.
    field(raw, "num_key_value_heads", int)
    window = None if raw.get("sliding_window") is None else field(raw, "sliding_window", int)
    return decoder_config(
        # Other families' rotary base is 10,000 where the file names none.
        raw | {"rope_theta": field(raw, "rope_theta", float, 1e6)},
        window=lambda layer: window,
        num_experts=field(raw, "num_local_experts", int),
        experts_per_token=field(raw, "num_experts_per_tok", int),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    windows = set(config.windows) or {None}
    refuse(
        config,
        "mixtral",
        windows=len(windows) > 1,
        attention_bias=config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        num_experts=not config.num_experts,
        renormalize_experts=not config.renormalize_experts,
    )
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    fields = decoder_fields(config, "MixtralForCausalLM", experts=True)
    return fields | experts | {"sliding_window": windows.pop()}


MIXTRAL = Policy(
    name="mixtral",
    model_types=("mixtral",),
    weights=_WEIGHTS,
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    fields=DECODER_FIELDS | {"sliding_window", "num_local_experts", "num_experts_per_tok"},
    harmless=frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}),
    fixed={"attention_bias": False, "mlp_bias": False},
    traits={"num_experts": 1, "experts_per_token": 1},
)
