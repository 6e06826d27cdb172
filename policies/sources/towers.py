"""Checkpoints of several models: which part of config.json and which tensors belong to one of them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from dsjax.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tower:
    """One model of a checkpoint.

    Attributes:
      model_type: of its policy.
      section: its part of config.json.
      defaults: what files leave out of that part; the policy knows only what every model of the family has.
      shared: fields of the whole config.json that count for it too.
      names: patterns of its tensors and what they are called in a checkpoint of its own; empty where that is the same,
        and its policy ignores the others.
    """

    model_type: str
    section: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()


_TOWERS: Mapping[str, Mapping[str, Tower]] = {
    "clip": {
        "text": Tower("clip_text_model", "text_config", shared=("projection_dim",)),
        "vision": Tower("clip_vision_model", "vision_config", shared=("projection_dim",)),
    },
    "gemma3": {
        "text": Tower(
            "gemma3_text",
            "text_config",
            defaults={
                "vocab_size": 262208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131072,
            },
            names=(
                (r"(?:language_model\.model|model\.language_model)\.(.*)", r"model.\1"),
                (r"(?:language_model\.)?lm_head\.(.*)", r"lm_head.\1"),
            ),
        )
    },
}


def find(raw: Mapping[str, Any], tower: str | None) -> Tower | None:
    """The tower that was asked for; `None` of a checkpoint that holds one model.

    Raises:
      ConfigError: a checkpoint of several models without saying which, or one that it has not.
    """
    kind = raw.get("model_type")
    towers = _TOWERS.get(str(kind), {})
    if tower not in (towers or (None,)):
        names = ", ".join(map(repr, towers))
        raise ConfigError(f"tower={tower!r}: a {kind} checkpoint has " + (f"the towers {names}" if towers else "none"))
    return None if tower is None else towers[tower]


def config_of(raw: Mapping[str, Any], tower: str | None) -> dict[str, Any]:
    """The config.json that a tower would have by itself.

    Raises:
      ConfigError: as for `find`.
    """
    found = find(raw, tower)
    if found is None:
        return dict(raw)
    # Files of transformers before 4.27 have a second dictionary, which counts where it is there.
    given = [raw[name] for name in (f"{found.section}_dict", found.section) if raw.get(name) is not None]
    shared = {name: raw.get(name) for name in found.shared}
    return {**found.defaults, **(given or [{}])[0], **shared, "model_type": found.model_type}


def tensors_of(raw: Mapping[str, Any], tower: str | None, tensors: Mapping[str, T]) -> dict[str, T]:
    """A tower's tensors under the names of a checkpoint of its own.

    Raises:
      ConfigError: as for `find`.
    """
    found = find(raw, tower)
    if found is None or not found.names:
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, own in found.names:
            if match := re.fullmatch(pattern, name):
                renamed[match.expand(own)] = tensor
    return renamed
