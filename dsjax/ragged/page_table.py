"""The page allocator: which slot holds which pages, and how many hold each.

A page is free exactly when its reference count is zero, so there is no free list to keep in step. Pages past a slot's
count are marked `P`, one past the last page: reads of it are masked and writes to it dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Pages of every slot.

    Invariant: `ref_counts[page]` is the number of slots whose first `num_pages` entries name it.
    """

    table: jax.Array  # int32[S, M], page ids in the order of the text, P where there is none
    num_pages: jax.Array  # int32[S], pages held
    ref_counts: jax.Array  # int32[P]

    @classmethod
    def empty(cls, slots: int, pages_per_slot: int, num_pages: int) -> "PageTable":
        """A table in which every page is free."""
        return cls(
            table=jnp.full((slots, pages_per_slot), num_pages, jnp.int32),
            num_pages=jnp.zeros(slots, jnp.int32),
            ref_counts=jnp.zeros(num_pages, jnp.int32),
        )

    @property
    def num_free(self) -> Int[Array, ""]:
        """Pages that nobody holds."""
        return jnp.sum(self.ref_counts == 0, dtype=jnp.int32)

    def free_list(self, size: int) -> Int[Array, "size"]:
        """The first `size` free pages in ascending order, filled up with `P`."""
        total = self.ref_counts.shape[0]
        return jnp.nonzero(self.ref_counts == 0, size=size, fill_value=total)[0].astype(jnp.int32)

    def grant(self, needy: Bool[Array, "S"], rank: Int[Array, "S"]) -> tuple["PageTable", Bool[Array, "S"]]:
        """Give one more page to each needy slot while there are any.

        Args:
          needy: slots that ask.
          rank: place of each needy slot in the line, from 0; the first ones are served.

        Returns:
          The new table and which slots got a page.
        """
        slots, total = needy.shape[0], self.ref_counts.shape[0]
        granted = needy & (rank < self.num_free)
        page = jnp.where(granted, self.free_list(slots)[jnp.where(granted, rank, 0)], total)
        row = jnp.where(granted, jnp.arange(slots), slots)
        return PageTable(
            table=self.table.at[row, self.num_pages].set(page, mode="drop"),
            num_pages=self.num_pages + granted,
            ref_counts=self.ref_counts.at[page].add(1, mode="drop"),
        ), granted

    def assign(self, slot: Int[Array, "C"], pages: Int[Array, "C M"]) -> "PageTable":
        """Fill empty slots with rows of pages, one more reference for each page named.

        Args:
          slot: slots to fill; out of range for rows to leave out.
          pages: their rows, `P` past the end.
        """
        slots, total = self.table.shape[0], self.ref_counts.shape[0]
        counted = jnp.where((slot < slots)[:, None], pages, total)
        return PageTable(
            table=self.table.at[slot].set(pages, mode="drop"),
            num_pages=self.num_pages.at[slot].set(jnp.sum(pages < total, axis=1, dtype=jnp.int32), mode="drop"),
            ref_counts=self.ref_counts.at[counted].add(1, mode="drop"),
        )

    def release(self, slots: Bool[Array, "S"]) -> "PageTable":
        """Take all pages from some slots; a page that nobody else holds becomes free."""
        total = self.ref_counts.shape[0]
        return PageTable(
            table=jnp.where(slots[:, None], total, self.table),
            num_pages=jnp.where(slots, 0, self.num_pages),
            ref_counts=self.ref_counts.at[jnp.where(slots[:, None], self.table, total)].add(-1, mode="drop"),
        )
