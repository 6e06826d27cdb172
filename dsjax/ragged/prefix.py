"""Prefix caching: full pages are found again by the text that they end.

The key of a text is the sum of a hash of each (token, position), 128 bits, salted: so it grows by one addition a
token, and pieces of a prompt can be added in any order. Keys are looked up in a table of buckets of four pages; entries
are never removed, since a page that was written anew no longer has the key that the entry was made for. A full bucket
loses an entry, which costs a hit and nothing else. Lookup and insertion touch the pages asked for, however many are
cached. Automatic prefix caching by hashed blocks is vLLM's; the table lives on the device here, beside the reference
counts, so that neither the host nor a step waits for the other.
"""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt32

from dsjax.ragged.page_table import KEY_WORDS, Contents

WAYS = 4
# Odd constants of the golden ratio and of xxHash and MurmurHash, one for each word of a key.
_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Keys of the texts that there are, and where pages with such keys are."""

    of_text: jax.Array  # uint32[Q, M, 4], of each sequence's text up to the end of each page; the last may grow yet
    index: jax.Array  # int32[G, 4], pages by bucket, P where there is none
    cached: jax.Array  # int32[Q], tokens of each prompt that were found when it was first looked for
    found: jax.Array  # int32, prompt tokens whose pages were found
    asked: jax.Array  # int32, prompt tokens that were looked for

    @classmethod
    def empty(cls, sequences: int, pages_per_slot: int, num_pages: int) -> "Prefixes":
        """Nothing cached."""
        buckets = 1 << max(4, (2 * num_pages - 1).bit_length())
        return cls(
            of_text=jnp.zeros((sequences, pages_per_slot, KEY_WORDS), jnp.uint32),
            index=jnp.full((buckets, WAYS), num_pages, jnp.int32),
            cached=jnp.zeros(sequences, jnp.int32),
            found=jnp.zeros((), jnp.int32),
            asked=jnp.zeros((), jnp.int32),
        )

    def lookup(self, contents: Contents, keys: UInt32[Array, "*shape words"]) -> Int[Array, "*shape"]:
        """A page that holds the end of each text, `P` where none does."""
        total = contents.keys.shape[0]
        entries = self.index[self._bucket(keys)]
        same = jnp.all(contents.keys.at[entries].get(mode="fill", fill_value=0) == keys[..., None, :], axis=-1)
        return jnp.min(jnp.where(same & jnp.any(keys != 0, axis=-1)[..., None], entries, total), axis=-1)

    def insert(self, contents: Contents, pages: Int[Array, "N"], keys: UInt32[Array, "N words"]):
        """Note what pages hold from now on.

        Args:
          contents: of all pages.
          pages: those that were filled; `P` for rows to leave out.
          keys: of the texts that they end.

        Returns:
          Both, updated.
        """
        total = contents.keys.shape[0]
        contents = replace(contents, keys=contents.keys.at[pages].set(keys, mode="drop"))
        bucket = self._bucket(keys)
        entries = self.index[bucket]
        held = contents.keys.at[entries].get(mode="fill", fill_value=0)
        is_live = jnp.any(held != 0, axis=-1) & (self._bucket(held) == bucket[:, None]) & (entries < total)
        is_known = jnp.any(jnp.all(held == keys[:, None], axis=-1) & (entries < total), axis=-1)
        enters = (pages < total) & ~is_known
        row = jnp.where(enters, bucket, self.index.shape[0])
        # Each takes a dead entry of its own; where there are no more, any one.
        place = jnp.arange(pages.shape[0])
        rank = jnp.sum((row == row[:, None]) & (place < place[:, None]), axis=1)
        is_next = ~is_live & (jnp.cumsum(~is_live, axis=1) == rank[:, None] + 1)
        chosen = jnp.where(jnp.any(is_next, axis=1), jnp.argmax(is_next, axis=1), keys[:, 1] % WAYS)
        return replace(self, index=self.index.at[row, chosen].set(pages, mode="drop")), contents

    def append(self, sequence, position, token, salt, page_size: int) -> "Prefixes":
        """Take a generated token of each slot into the keys of its sequence.

        Args:
          sequence: `int32[S]`, `Q` for slots to leave out.
          position: `int32[S]`, of the token in its text.
          token: `int32[S]`.
          salt: `uint32[S]`.
          page_size: tokens a page.
        """
        page = position // page_size
        before = jnp.where(position % page_size == 0, page - 1, page)
        key = self.of_text.at[sequence, before].get(mode="fill", fill_value=0) + hash_token(token, position, salt)
        return replace(self, of_text=self.of_text.at[sequence, page].set(key, mode="drop"))

    def enter(self, row, position, token, salt, complete, page_size: int) -> "Prefixes":
        """Take pieces of prompts into the keys of their rows.

        Args:
          row: `int32[U]`, sequence of each token, `Q` for those to leave out.
          position: `int32[U]`, in the prompt.
          token: `int32[U]`.
          salt: `uint32[U]`.
          complete: `int32[A]`, sequences whose prompt is now whole, `Q` for none.
          page_size: tokens a page.
        """
        # Until the prompt is whole, each page has the sum of its own tokens alone.
        sums = self.of_text.at[row, position // page_size].add(hash_token(token, position, salt), mode="drop")
        whole = jnp.cumsum(sums.at[complete].get(mode="fill", fill_value=0), axis=1, dtype=jnp.uint32)
        return replace(self, of_text=sums.at[complete].set(whole, mode="drop"))

    def enter_whole(self, texts: Int[Array, "Q C"], lengths: Int[Array, "Q"], salts: UInt32[Array, "Q"]) -> "Prefixes":
        """Make the keys of all texts anew; `C` is whole pages."""
        rows, columns = self.of_text.shape[:2]
        place = jnp.arange(texts.shape[1])

        def key(text, length, salt):
            parts = hash_token(text, place, jnp.broadcast_to(salt, text.shape))
            parts = jnp.where((place < length)[:, None], parts, 0).reshape(columns, -1, KEY_WORDS)
            return jnp.cumsum(jnp.sum(parts, axis=1, dtype=jnp.uint32), axis=0, dtype=jnp.uint32)

        return replace(self, of_text=lax.map(lambda row: key(*row), (texts, lengths, salts), batch_size=min(rows, 16)))

    def _bucket(self, keys: UInt32[Array, "*shape words"]) -> Int[Array, "*shape"]:
        return (keys[..., 0] & jnp.uint32(self.index.shape[0] - 1)).astype(jnp.int32)


def hash_token(token: Int[Array, "N"], position: Int[Array, "N"], salt: UInt32[Array, "N"]) -> UInt32[Array, "N words"]:
    """A key's part of one token at one place."""
    factor = jnp.array(_FACTORS, jnp.uint32)
    x = _scramble((token.astype(jnp.uint32) ^ salt)[:, None] * factor + factor[::-1])
    return _scramble(x ^ (position.astype(jnp.uint32)[:, None] * factor[::-1] + salt[:, None]))


def of_group(keys: UInt32[Array, "*shape words"], group: int) -> UInt32[Array, "*shape words"]:
    """Keys of the pages that a group of layers has of texts; zeros stay."""
    return jnp.where(
        jnp.any(keys != 0, axis=-1, keepdims=True), keys + jnp.array(_FACTORS, jnp.uint32) * jnp.uint32(group), keys
    )


def _scramble(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Spread every bit over the word: the finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
