"""Fields of config.json of models with multi-head latent attention."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.fields import Codec, Custom, Field, field, lookup, sizes
from policies.rope_fields import Rope, yarn_mscale


def _read_query_rank(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    if "q_lora_rank" not in raw:  # null says that queries are projected at once, so it can not stand for a default
        raise ConfigError("config field q_lora_rank is missing")
    return {"latent.query_rank": field(raw, "q_lora_rank", int, None)}


def _read_heads(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    heads = field(raw, "num_key_value_heads", int, known["num_heads"])
    if heads != known["num_heads"]:
        raise ConfigError(
            f"num_key_value_heads={heads} differs from num_attention_heads={known['num_heads']}: latent attention "
            "has keys of each head"
        )
    return {"num_kv_heads": heads, "head_dim": known["latent.nope_size"] + known["latent.rope_size"]}


_OWN = frozenset({"num_key_value_heads", "head_dim"})
LATENT: tuple[Codec, ...] = (
    *(codec for codec in sizes() if not codec.fields & _OWN),
    Custom(("q_lora_rank",), _read_query_rank, lambda config: {"q_lora_rank": lookup(config, "latent.query_rank")}),
    Field("kv_lora_rank", "latent.kv_rank"),
    Field("qk_rope_head_dim", "latent.rope_size"),
    Field("qk_nope_head_dim", "latent.nope_size"),
    Field("v_head_dim", "latent.value_size"),
    # transformers calls the rotated part of a head head_dim; both names follow from the fields above.
    Custom((*_OWN, "qk_head_dim"), _read_heads, lambda config: {"num_key_value_heads": config.num_kv_heads}),
)
# For checking a map when it is registered.
EXAMPLE = {f"latent.{name}": 2 for name in ("kv_rank", "query_rank", "rope_size", "nope_size", "value_size")}


@dataclasses.dataclass(frozen=True)
class LatentRope(Rope):
    """Rotary fields; yarn's `mscale_all_dim` scales attention scores, of the part that is not rotated too."""

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """As `Rope.read`, and `attention_scale`."""
        found = super().read(raw, known)
        scaling = found["rope_scaling"]
        values = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        all_dim = field(values, "mscale_all_dim", float, 0.0)
        if scaling is None or not all_dim:
            return found
        return found | {"attention_scale": known["head_dim"] ** -0.5 * yarn_mscale(scaling.factor, all_dim) ** 2}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """As `Rope.write`, with the scale of attention as `mscale_all_dim`."""
        written = super().write(config)
        scaling = config.rope_scaling
        if scaling is not None and scaling.factor > 1 and config.attention_scale is not None:
            sharpened = math.sqrt(config.attention_scale * math.sqrt(config.head_dim))
            # Rounded, 0.707 comes back as itself and not as its neighbour.
            written["rope_scaling"]["mscale_all_dim"] = round((sharpened - 1) / (0.1 * math.log(scaling.factor)), 12)
        return written
