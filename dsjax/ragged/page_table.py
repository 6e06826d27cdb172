"""The page allocator: which slot holds which pages, and how many hold each.

A page is free exactly when its reference count is zero, so there is no free list to keep in step. Entries of a row
without a page are marked `P`, one past the last page: reads of it are masked and writes to it dropped.

A free page may still hold a text that somebody asks for again (prefix caching). Such pages are given out last, and
among them the one that nobody held for the longest time first.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.dispatch import current_gpu

NEVER = jnp.iinfo(jnp.int32).max
KEY_WORDS = 4  # of 32 bits in the key of a text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contents:
    """What pages hold, in use or not, and since when nobody held them."""

    keys: jax.Array  # uint32[P, 4], key of the text up to the end of the page; zeros where nothing can be shared
    released: jax.Array  # int32[P], by the clock
    clock: jax.Array  # int32

    @classmethod
    def empty(cls, num_pages: int) -> "Contents":
        """Pages that hold nothing."""
        return cls(
            keys=jnp.zeros((num_pages, KEY_WORDS), jnp.uint32),
            released=jnp.zeros(num_pages, jnp.int32),
            clock=jnp.zeros((), jnp.int32),
        )

    def ages(self) -> Int[Array, "P"]:
        """The order in which free pages are given out: those with no contents first, then the longest free."""
        return jnp.where(jnp.any(self.keys != 0, axis=1), self.released, -1)

    def stamp(self, pages: Int[Array, "S GM"]) -> "Contents":
        """Note that pages are given back now; of one row the end goes before the beginning, which more texts share."""
        columns = pages.shape[1]
        # Halfway to the largest number the clock is put back; what was released before then counts as equally old.
        shift = jnp.where(self.clock > NEVER // 2, NEVER // 2, 0)
        clock, released = self.clock - shift, jnp.maximum(self.released - shift, 0)
        time = jnp.broadcast_to(clock + columns - jnp.arange(columns), pages.shape)
        return replace(self, released=released.at[pages].max(time, mode="drop"), clock=clock + columns + 1)

    def forget(self, pages: Int[Array, "*shape"]) -> "Contents":
        """Drop what is known of pages that will be written anew."""
        return replace(self, keys=self.keys.at[pages].set(0, mode="drop"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Pages of every slot.

    Invariant: `ref_counts[page]` is the number of slots whose row names it.
    """

    table: jax.Array  # int32[S, G * M], each group's page ids in the order of the text, P where there is none
    num_pages: jax.Array  # int32[S], columns that were filled in each group; those behind a window are given back
    ref_counts: jax.Array  # int32[P]
    contents: Contents | None = None  # kept for prefix caching
    groups: int = dataclasses.field(default=1, metadata={"static": True})  # rows of each slot, one behind the other

    @classmethod
    def empty(
        cls, slots: int, pages_per_slot: int, num_pages: int, caching: bool = False, groups: int = 1
    ) -> "PageTable":
        """A table in which every page is free."""
        return cls(
            table=jnp.full((slots, groups * pages_per_slot), num_pages, jnp.int32),
            num_pages=jnp.zeros(slots, jnp.int32),
            ref_counts=jnp.zeros(num_pages, jnp.int32),
            contents=Contents.empty(num_pages) if caching else None,
            groups=groups,
        )

    @property
    def columns(self) -> int:
        """Pages that a slot may name in each group (M)."""
        return self.table.shape[1] // self.groups

    @property
    def num_free(self) -> Int[Array, ""]:
        """Pages that nobody holds."""
        return jnp.sum(self.ref_counts == 0, dtype=jnp.int32)

    def free_list(self, size: int) -> Int[Array, "size"]:
        """The first `size` free pages in the order to give them out, filled up with `P`."""
        total = self.ref_counts.shape[0]
        is_free = self.ref_counts == 0
        if self.contents is None:
            return jnp.nonzero(is_free, size=size, fill_value=total)[0].astype(jnp.int32)
        size_found = min(size, total)
        age, page = lax.top_k(-jnp.where(is_free, self.contents.ages(), NEVER), size_found)
        page = jnp.where(age == -NEVER, total, page)
        return jnp.pad(page, (0, size - size_found), constant_values=total)

    def extend(self, count: Int[Array, "S"], most: int) -> "PageTable":
        """Fill `count[s]` more columns of each slot's rows; there must be as many free pages.

        Args:
          count: columns of each slot.
          most: columns of all slots together, at most.
        """
        total = self.ref_counts.shape[0]

        def extended():
            free = self.free_list(min(most * self.groups, total))
            place = jnp.arange(self.columns) - self.num_pages[:, None]
            is_new = (place >= 0) & (place < count[:, None])
            index = ((jnp.cumsum(count) - count)[:, None] + place) * self.groups
            index = jnp.concatenate([jnp.where(is_new, index + group, total) for group in range(self.groups)], axis=1)
            page = free.at[index].get(mode="fill", fill_value=total)
            return replace(
                self,
                table=jnp.where(jnp.tile(is_new, (1, self.groups)), page, self.table),
                num_pages=self.num_pages + count,
                ref_counts=self.ref_counts.at[page].add(1, mode="drop"),
                contents=self.contents and self.contents.forget(page),
            )

        return _if_any(count > 0, extended, lambda: self)

    def assign(
        self, slot: Int[Array, "C"], pages: Int[Array, "C GM"], held: Int[Array, "C"], fresh: Bool[Array, "C GM"]
    ) -> "PageTable":
        """Fill empty slots with rows of pages, one more reference for each page named.

        Args:
          slot: slots to fill; out of range for rows to leave out.
          pages: their rows, `P` where there is none.
          held: how many columns of each are filled.
          fresh: which of the pages were free, and will be written anew.
        """
        slots, total = self.table.shape[0], self.ref_counts.shape[0]
        counted = jnp.where((slot < slots)[:, None], pages, total)
        return replace(
            self,
            table=self.table.at[slot].set(pages, mode="drop"),
            num_pages=self.num_pages.at[slot].set(held, mode="drop"),
            ref_counts=self.ref_counts.at[counted].add(1, mode="drop"),
            contents=self.contents and self.contents.forget(jnp.where(fresh, counted, total)),
        )

    def release(self, slots: Bool[Array, "S"]) -> "PageTable":
        """Take all pages from some slots; a page that nobody else holds becomes free."""
        table = self.give_back(jnp.broadcast_to(slots[:, None], self.table.shape))
        return replace(table, num_pages=jnp.where(slots, 0, self.num_pages))

    def give_back(self, entries: Bool[Array, "S GM"]) -> "PageTable":
        """Take single pages from their slots, which keep their places in the row."""
        total = self.ref_counts.shape[0]

        def taken():
            pages = jnp.where(entries, self.table, total)
            return replace(
                self,
                table=jnp.where(entries, total, self.table),
                ref_counts=self.ref_counts.at[pages].add(-1, mode="drop"),
                contents=self.contents and self.contents.stamp(pages),
            )

        return _if_any(entries, taken, lambda: self)


def _if_any(flags: jax.Array, changed: Callable, unchanged: Callable) -> Any:
    """`changed()` if any flag is set, else `unchanged()`, which is what the first then gives too.

    Most steps change nothing, and a CPU saves the work; on a GPU it is small.
    """
    return lax.cond(jnp.any(flags), changed, unchanged) if current_gpu() is None else changed()
