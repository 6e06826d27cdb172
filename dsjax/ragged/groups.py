"""Groups of layers: those with a sliding window give pages back that the others still need.

A page holds some tokens of *one* group of layers, and every group has as many, so pages are all of one size and come
from one pool: a sequence has a row of pages for each group, and behind its window a group gives back its own alone.
With 2 layers that see everything (A, B) and 4 with a window (c to f), in groups of 2:

    buffer 0    A  c  e        table of a slot, each letter a page of two layers
    buffer 1    B  d  f            AB AB AB AB    cd: .. .. cd cd    ef: .. .. ef ef

vLLM's hybrid cache manager has groups of this kind.
"""

import dataclasses
from typing import Any

import jax

from dsjax.config import ModelConfig
from dsjax.inputs import numpy_of

# Groups of few layers fit any model; groups of many are fewer rows to keep. So much memory is given for the latter.
_WASTE = 1.1


def pages_for(tokens, page_size: int):
    """Pages that hold so many tokens."""
    return (tokens + page_size - 1) // page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageGroups:
    """Which layers share pages, and how far each group looks back."""

    windows: tuple[Any, ...] = (None,)  # keys that a query of each group sees, its own included; `None` for all
    most: tuple[Any, ...] = (None,)  # pages of each group that a sequence holds at a time; `None` for all it ever has
    # Group and buffer of each layer; empty where layer i has buffer i of the only group.
    places: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def count(self) -> int:
        """How many groups there are (G)."""
        return len(self.windows)

    def peak(self, columns: Any) -> Any:
        """Pages that a sequence takes at most at a time, while its rows grow by so many columns."""
        return sum(columns if most is None else numpy_of(columns, most).minimum(columns, most) for most in self.most)

    def held(self, tokens: int, page_size: int) -> int:
        """Pages that a sequence of so many tokens holds when those behind windows are given back."""
        behind = [0 if window is None else max(0, tokens - window + 1) // page_size for window in self.windows]
        return self.count * pages_for(tokens, page_size) - sum(behind)


def page_groups(config: ModelConfig, tokens: int, page_size: int, token_budget: int) -> PageGroups:
    """Groups for a model, if its layers differ and the longest sequences outgrow the windows; else one.

    Args:
      config: the model's.
      tokens: of the longest sequence.
      page_size: tokens a page.
      token_budget: most tokens of a sequence in one step, all of which see what is in their windows.
    """
    columns = pages_for(tokens, page_size)
    windows = [config.window(layer) for layer in range(config.num_layers)]
    window = max((window for window in windows if window is not None), default=None)
    if window is None:
        return PageGroups()
    most = min(pages_for(window - 1 + token_budget, page_size) + 1, columns)
    if None not in windows:
        return PageGroups((window,), (most,))
    local = [layer for layer, window in enumerate(windows) if window is not None]
    others = [layer for layer, window in enumerate(windows) if window is None]

    def groups(layers: list[int], size: int) -> int:
        return -(-len(layers) // size)

    def memory(size: int) -> int:
        return size * (groups(others, size) * columns + groups(local, size) * most)

    sizes = range(1, config.num_layers + 1)
    least = min(map(memory, sizes))
    if least * _WASTE >= config.num_layers * columns:
        return PageGroups()
    size = max(size for size in sizes if memory(size) <= least * _WASTE)
    first = groups(others, size)
    places = {layer: (i // size, i % size) for i, layer in enumerate(others)}
    places |= {layer: (first + i // size, i % size) for i, layer in enumerate(local)}
    counts = first, groups(local, size)
    return PageGroups(
        windows=(None,) * counts[0] + (window,) * counts[1],
        most=(None,) * counts[0] + (most,) * counts[1],
        places=tuple(places[layer] for layer in range(config.num_layers)),
    )
