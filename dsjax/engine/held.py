"""Sequences that callers drive token by token: what the engine's loop has to know of them."""

import dataclasses

from dsjax.engine.programs import Sizes
from dsjax.ragged.groups import pages_for


@dataclasses.dataclass(frozen=True)
class HeldSequence:
    """Its slot, and how many tokens it has seen."""

    slot: int
    seen: int


class Held:
    """All of them; read and written under the lock of the engine's loop.

    Attributes:
      by_uid: those that there are.
      lost: uids of those whose pages are gone, until they are flushed.
    """

    def __init__(self, sizes: Sizes):
        self._sizes = sizes
        self.by_uid: dict[int, HeldSequence] = {}
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.by_uid)

    @property
    def pages(self) -> int:
        """Pages that they have."""
        return sum(
            self._sizes.groups.held(sequence.seen, self._sizes.page_size) for sequence in list(self.by_uid.values())
        )

    def lose(self) -> None:
        """Note that there are new, empty pages."""
        self.lost |= self.by_uid.keys()
        self.by_uid.clear()

    def shortage(self, length: int, limit: int) -> str:
        """Why a request can not be served beside them; empty if it can.

        Args:
          length: prompt tokens.
          limit: most new ones.
        """
        if len(self) >= self._sizes.slots:
            return "all slots are held by sequences of put: flush one, or make the engine with more slots"
        needed = self._sizes.groups.peak(pages_for(length + limit - 1, self._sizes.page_size))
        held = self.pages
        if needed <= self._sizes.pages - held:
            return ""
        return (
            f"{length} prompt tokens and up to {limit} new ones need {needed} pages of {self._sizes.page_size} tokens, "
            f"and there are {self._sizes.pages - held}: lower max_tokens, "
            + (f"flush sequences of put, which hold {held} more, " if held else "")
            + "or make the engine with more pages"
        )
