"""Rotary fields of config.json: base, partial rotation and scaling, in transformers' spellings before and since 5."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig, RopeScaling
from dsjax.errors import ConfigError
from policies.fields import field

# What each kind of scaling reads besides the base.
_READS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"},
}
_COMMON = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary base, how much of a head is rotated, and scaling.

    Attributes:
      theta: base of files that name none.
      partial: how much of a head is rotated in files that do not say; `None` in families that rotate whole heads.
      local: name of the field that holds the base of layers with a window, in families where that differs.
      local_theta: its default.
      theta_name: name of the base's field.
      partial_name: name of the field that holds how much of a head is rotated, as a fraction.
    """

    theta: float = 10000.0
    partial: float | None = None
    local: str | None = None
    local_theta: float = 10000.0
    theta_name: str = "rope_theta"
    partial_name: str = "partial_rotary_factor"

    @property
    def fields(self) -> frozenset[str]:
        """Names in config.json."""
        names = {self.theta_name, self.partial_name, "rope_scaling", "rope_parameters"}
        names.add("original_max_position_embeddings")
        return frozenset(names | ({self.local} if self.local else set()))

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`rope_theta`, `rotary_dim`, `rope_scaling` and, where the family has one, `local_rope_theta`."""
        name, values = _parameters(raw)
        found: dict[str, Any] = {}
        if self.local:
            theta = field(raw, self.local, float, self.local_theta)
            if any(kind in values for kind in _LAYER_TYPES):
                if unknown := values.keys() - set(_LAYER_TYPES):
                    raise ConfigError(f"{name} has {sorted(unknown)} beside layer types")
                local = values.get("sliding_attention") or {}
                if local.get("rope_type", "default") != "default":
                    raise ConfigError(f"{name}.sliding_attention.rope_type={local['rope_type']!r} is not supported")
                theta, values = field(local, "rope_theta", float, theta), values.get("full_attention") or {}
            found["local_rope_theta"] = theta
        partial = self._partial(name, values, raw)
        theta = field(values, "rope_theta", float, field(raw, self.theta_name, float, self.theta))
        found["rope_theta"] = theta
        found["rotary_dim"] = None if partial == 1 else int(known["head_dim"] * partial)
        scaling, context = _scaling(name, values, raw, known["max_context"])
        return found | {"rope_scaling": scaling, "max_context": context}

    def _partial(self, name: str, values: dict[str, Any], raw: Mapping[str, Any]) -> float:
        of_family = 1.0 if self.partial is None else self.partial
        inner = "partial_rotary_factor" in values
        partial = field(values, "partial_rotary_factor", float, field(raw, self.partial_name, float, of_family))
        where = f"{name}.partial_rotary_factor" if inner else self.partial_name
        if self.partial is None and partial != 1:
            raise ConfigError(f"config field {where}={partial!r} is not supported; only 1.0 is")
        if not 0 < partial <= 1:
            raise ConfigError(f"config field {where}={partial!r} must be above 0 and at most 1")
        return partial

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The older spelling, which transformers reads in versions 4 and 5."""
        scaling = config.rope_scaling
        written: dict[str, Any] = {self.theta_name: config.rope_theta, "rope_scaling": None}
        if self.partial is not None:
            written[self.partial_name] = config.rotary_size / config.head_dim
        if self.local:
            written[self.local] = config.local_rope_theta
        if scaling is not None:
            written["rope_scaling"] = _write_scaling(scaling)
            if scaling.kind == "dynamic":
                written["max_position_embeddings"] = scaling.original_context
            if scaling.kind == "longrope":
                written["original_max_position_embeddings"] = scaling.original_context
        return written


def _parameters(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    given = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    if len(given) == 2 and raw["rope_scaling"] != raw["rope_parameters"]:
        raise ConfigError("rope_scaling and rope_parameters are both given and differ; keep one of them")
    name = given[0] if given else "rope_parameters"
    values = raw.get(name) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"config field {name}={values!r} should be a dictionary")
    return name, values


def _scaling(
    name: str, values: dict[str, Any], raw: Mapping[str, Any], max_context: int
) -> tuple[RopeScaling | None, int]:
    """The scaling, and the longest context with it."""
    kind_name = "rope_type" if "rope_type" in values else "type"
    kind = values.get(kind_name, "default")
    if kind == "su":  # the first name of longrope
        kind = "longrope"
    if kind not in _READS:
        raise ConfigError(f"{name}.{kind_name}={kind} is not supported; {', '.join(_READS)} are")
    for key, value in values.items():
        neutral = value is None or (key == "factor" and value == 1)
        if key not in _READS[kind] | _COMMON and not neutral:
            raise ConfigError(f"{name}.{key}={value!r} is not supported with {kind_name}={kind}")
    if kind == "default":
        return None, max_context

    factor = field(values, "factor", float, 1.0 if kind == "longrope" else None)
    if factor is None:
        raise ConfigError("config field factor is missing")
    # The one beside the dictionary comes first, as in transformers.
    within = field(values, "original_max_position_embeddings", int, max_context)
    original = field(raw, "original_max_position_embeddings", int, within)
    if kind == "linear":
        return RopeScaling("linear", factor=factor), max_context
    if kind == "dynamic":
        # transformers measures a text against max_position_embeddings, whatever the original length is said to be.
        return RopeScaling("dynamic", factor=factor, original_context=max_context), round(max_context * factor)
    if kind == "llama3":
        low, high = (field(values, f"{end}_freq_factor", float) for end in ("low", "high"))
        scaling = RopeScaling(
            "llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
        )
        return scaling, max_context
    if kind == "yarn":
        scaling = RopeScaling(
            "yarn",
            factor=factor,
            original_context=original,
            beta_fast=field(values, "beta_fast", float, 32.0),
            beta_slow=field(values, "beta_slow", float, 1.0),
            truncate=field(values, "truncate", bool, True),
            attention_factor=_yarn_attention_factor(values, factor),
        )
        return scaling, max_context
    if values.get("factor") is None:
        factor = max_context / original
    stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scaling = RopeScaling(
        "longrope",
        original_context=original,
        factors=tuple(map(float, field(values, "short_factor", list))),
        long_factors=tuple(map(float, field(values, "long_factor", list))),
        attention_factor=field(values, "attention_factor", float, stretched),
    )
    return scaling, max_context


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much attention is sharpened for a stretched context (arXiv 2309.00071)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_attention_factor(values: dict[str, Any], factor: float) -> float:
    given = field(values, "attention_factor", float, None)
    if given is not None:
        return given
    mscale, all_dim = (field(values, name, float, None) for name in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "factors":
        raise ConfigError("rope_scaling of kind 'factors' (from a GGUF file) has no spelling in config.json")
    written: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "longrope":
        written["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        written |= {"truncate": scaling.truncate, "attention_factor": scaling.attention_factor}
    if scaling.kind == "longrope":
        written |= {"short_factor": list(scaling.factors), "long_factor": list(scaling.long_factors)}
        written["attention_factor"] = scaling.attention_factor
    return written
