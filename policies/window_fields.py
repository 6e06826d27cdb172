"""Sliding-window fields of config.json: one size, and which layers have it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from policies.fields import field

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Windows:
    """The sliding window of each layer.

    A window of `w` in config.json lets a query see itself and the `w - 1` tokens before it, as here.

    Attributes:
      has_window: whether a layer has one, from the file's fields and the layer's index, where the file does not list
        the types of its layers.
      switch: name of the field that turns windows on, in families that have one.
      default: window of files that lack the field.
      lists_types: the file may list the types of its layers, as `layer_types`.
      reads: further fields that `has_window` reads.
    """

    has_window: Callable[[Mapping[str, Any], int], bool] = lambda raw, index: True
    switch: str | None = None
    default: int | None = None
    lists_types: bool = True
    reads: frozenset[str] = frozenset()

    @property
    def fields(self) -> frozenset[str]:
        """Names in config.json."""
        names = {"sliding_window"} | ({self.switch} if self.switch else set())
        return frozenset(names | ({"layer_types"} if self.lists_types else set())) | self.reads

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`windows`.

        Raises:
          ConfigError: the fields contradict each other.
        """
        # Null means that there is none, whatever the default of an absent field is.
        window = field(raw, "sliding_window", int, None if "sliding_window" in raw else self.default)
        if self.switch and not field(raw, self.switch, bool, False):
            window = None
        layers = known["num_layers"]
        types = raw.get("layer_types") if self.lists_types else None
        if types is None:
            types = [LAYER_TYPES[window is not None and self.has_window(raw, i)] for i in range(layers)]
        for kind in types:
            if kind not in LAYER_TYPES:
                raise ConfigError(f"layer_types has {kind!r}; supported are {', '.join(LAYER_TYPES)}")
            if kind == "sliding_attention" and window is None:
                raise ConfigError(
                    f"layer_types has 'sliding_attention', but {self.switch + '/' if self.switch else ''}"
                    "sliding_window is not set"
                )
        if len(types) != layers:
            raise ConfigError(f"layer_types names {len(types)} layers, num_hidden_layers is {layers}")
        windows = tuple(window if kind == "sliding_attention" else None for kind in types)
        return {"windows": () if set(windows) == {None} else windows}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The size, and the type of each layer where the family lists them."""
        size = next((window for window in config.windows if window is not None), None)
        written: dict[str, Any] = {"sliding_window": size}
        if self.switch:
            written[self.switch] = size is not None
        if self.lists_types:
            written["layer_types"] = [LAYER_TYPES[config.window(i) is not None] for i in range(config.num_layers)]
        return written


@dataclasses.dataclass(frozen=True)
class RotaryWindows(Windows):
    """Sliding windows, and rotation in the layers that have one only.

    Attributes:
      rotates_without: a model that has no window at all rotates every layer.
    """

    rotates_without: bool = False

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`windows` and `unrotated_layers`."""
        windows = super().read(raw, known)["windows"]
        if self.rotates_without and "sliding_window" in raw and raw["sliding_window"] is None:
            return {"windows": windows}
        unrotated = tuple(window is None for window in windows or (None,) * known["num_layers"])
        return {"windows": windows, "unrotated_layers": unrotated if any(unrotated) else ()}
