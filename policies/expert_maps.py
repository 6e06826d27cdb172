"""What families with a mixture of experts share: tensor names and fields of config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.base import Either, Entry, each
from policies.decoder import KINDS, LAYER
from policies.fields import Custom, Field, field
from policies.ops import Join, Stack

_EXPERTS = "layers.{i}.mlp.experts"
# Training alone reads them.
ROUTER_LOSS = frozenset({"aux_loss_alpha", "output_router_logits", "router_aux_loss_coef", "seq_aux"})
# For checking a map when it is registered.
EXAMPLE = {"experts.count": 1, "experts.per_token": 1, "experts.size": 1}


def router(tensor: str) -> Entry:
    """The entry of the router's weight."""
    return Entry("layers.{i}.mlp.router.weight", tensor)


def one_by_one(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Entry, ...]:
    """Entries of files that have a tensor for each expert: `experts.0.gate_proj.weight`."""
    names = {"gate": gate, "up": up, "down": down}
    return tuple(
        Entry(f"{_EXPERTS}.{leaf}.weight", f"{module}.{{e}}.{tensor}.weight", Stack()) for leaf, tensor in names.items()
    )


def stacked(gate_up: str, down: str) -> tuple[Entry, ...]:
    """Entries of one tensor for all experts, gate and up below each other."""
    gates = Entry((f"{_EXPERTS}.gate.weight", f"{_EXPERTS}.up.weight"), gate_up, Join(axis=-2))
    return gates, Entry(f"{_EXPERTS}.down.weight", down)


# A file has a tensor for each expert, transformers' module (since 5) one for all.
EXPERTS = Either(
    (
        one_by_one(f"{LAYER}.mlp.experts"),
        stacked(f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"),
    )
)


def shared(module: str) -> tuple[Entry, ...]:
    """Entries of the network that all tokens pass."""
    return tuple(
        entry
        for leaf in ("gate", "up", "down")
        for entry in each(KINDS, f"layers.{{i}}.mlp.shared.{leaf}", f"{module}.{leaf}_proj")
    )


CORRECTION = Entry("layers.{i}.mlp.router.correction", f"{LAYER}.mlp.gate.e_score_correction_bias")
# DeepSeek-V3's way to choose experts, which others took over.
V3_ROUTING = (
    Field("n_group", "experts.groups"),
    Field("topk_group", "experts.groups_per_token"),
    Field("norm_topk_prob", "experts.renormalize", bool, True),
    Field("routed_scaling_factor", "experts.scale", float),
)
V3_TRAITS = {"experts.score": "sigmoid", "experts.correction": True, "experts.group_score": "top2"}


def _read_shared(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {"experts.shared_size": field(raw, "n_shared_experts", int) * known["experts.size"]}


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    return {"n_shared_experts": experts.shared_size // experts.size if experts else 0}


# The network that all tokens pass is so many experts wide.
SHARED_COUNT = Custom(("n_shared_experts",), _read_shared, _write_shared)


def _layers(has_experts: list[bool]) -> dict[str, Any]:
    return {"experts.layers": () if all(has_experts) else tuple(has_experts)}


@dataclasses.dataclass(frozen=True)
class SparseLayers:
    """Which layers have experts: every so many, and not those that are listed (Qwen)."""

    @property
    def fields(self) -> frozenset[str]:
        """Names in config.json."""
        return frozenset({"decoder_sparse_step", "mlp_only_layers"})

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`experts.layers`."""
        step = field(raw, "decoder_sparse_step", int, 1)
        dense = field(raw, "mlp_only_layers", list, [])
        if step < 1:
            raise ConfigError(f"config field decoder_sparse_step={step} must be at least 1")
        return _layers([(i + 1) % step == 0 and i not in dense for i in range(known["num_layers"])])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """A step of 1, and the layers without experts."""
        dense = [i for i in range(config.num_layers) if not config.has_experts(i)]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _read_dense_first(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    dense = field(raw, "first_k_dense_replace", int)
    return _layers([i >= dense for i in range(known["num_layers"])])


def _write_dense_first(config: ModelConfig) -> dict[str, Any]:
    return {"first_k_dense_replace": [*map(config.has_experts, range(config.num_layers)), True].index(True)}


# How many layers, from the first, have no experts (DeepSeek).
DENSE_FIRST = Custom(("first_k_dense_replace",), _read_dense_first, _write_dense_first)
