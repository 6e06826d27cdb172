"""Sequences that the caller drives token by token: the contract of DeepSpeed's `InferenceEngineV2`.

They take slots and pages of the same pool as requests, and are never put back for want of pages.
"""

import warnings
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import jax
import numpy as np

from dsjax.engine.core import Core
from dsjax.engine.held import HeldSequence
from dsjax.engine.streams import interrupts_deferred
from dsjax.errors import EngineError, RequestError
from dsjax.ragged.groups import pages_for
from dsjax.ragged.state import FREE


class SchedulingResult(IntEnum):
    """Whether tokens can be computed now, or what stands against it; names and numbers of the original."""

    Success = 0
    EngineSequenceLimitExceeded = 1  # no slot is free for a new sequence
    BatchSequenceLimitExceeded = 2  # more sequences at once than there are slots
    BatchTokenLimitExceeded = 3  # more tokens at once than the token budget
    KVCacheLimitExceeded = 4  # more pages than there are
    SequenceTokenLimitExceeded = 5  # a sequence would outgrow the context


_REMEDIES = {
    SchedulingResult.EngineSequenceLimitExceeded: "flush a sequence, or make the engine with more slots",
    SchedulingResult.BatchSequenceLimitExceeded: "put fewer sequences at once, or make the engine with more slots",
    SchedulingResult.BatchTokenLimitExceeded: "put fewer tokens at once, or make the engine with a larger token_budget",
    SchedulingResult.KVCacheLimitExceeded: "flush a sequence, or make the engine with more pages",
    SchedulingResult.SequenceTokenLimitExceeded: "flush the sequence, or make the engine with a larger max_context",
}


class SchedulingError(EngineError):
    """`put` was refused; nothing has changed.

    Attributes:
      result: why.
    """

    def __init__(self, result: SchedulingResult):
        super().__init__(f"{result.name}: {_REMEDIES[result]}")
        self.result = result


class Contract:
    """The sequences of one engine that their caller drives.

    Args:
      core: the engine's loop, whose state they share.
    """

    def __init__(self, core: Core):
        self._core = core
        self._held = core.held

    def put(self, uids: Sequence[int], token_lists: Sequence[Sequence[int]]) -> jax.Array:
        """Compute the next tokens of sequences; a uid that is unknown begins one.

        Args:
          uids: names of sequences, each once.
          token_lists: ids for each, at least one.

        Returns:
          `float32[len(uids), V]`, logits of the last token of each.

        Raises:
          SchedulingError: they can not be computed now; `result` says why, and nothing has changed.
          RequestError: tokens are missing or out of range, or a uid comes twice.
          EngineError: the pages of a sequence are lost, those of all are released, or the computation failed.
        """
        core, sizes, vocab = self._core, self._core.sizes, self._core.params.config.vocab_size
        uids = _whole_numbers("uids", uids)
        lists = [_whole_numbers("token_lists", tokens) for tokens in token_lists]
        if not uids or len(uids) != len(lists):
            raise RequestError(
                f"put needs a list of tokens for each of at least one uid, got {len(lists)} for {len(uids)}"
            )
        for uid, tokens in zip(uids, lists, strict=True):
            if not tokens:
                raise RequestError(f"uid {uid} has no tokens to compute")
            if min(tokens) < 0 or max(tokens) >= vocab:
                raise RequestError(f"uid {uid} has a token id outside 0 to {vocab - 1}")
        with core.lock, interrupts_deferred() as interrupted:
            result = self.can_schedule(uids, [len(tokens) for tokens in lists])
            if result != SchedulingResult.Success:
                raise SchedulingError(result)
            free = iter(np.flatnonzero(np.asarray(core.require_state().slots.sequence) == FREE).tolist())
            chosen = [self._held.by_uid.get(uid) or HeldSequence(next(free), 0) for uid in uids]
            decodes = all(len(tokens) == 1 for tokens in lists)
            total = sizes.slots if decodes else sizes.token_budget
            batch = {
                "tokens": np.zeros(total, np.int32),
                "positions": np.zeros(total, np.int32),
                "slot_of_token": np.full(total, sizes.slots, np.int32),
                "new_pages": np.zeros(sizes.slots, np.int32),
            }
            q_lens = np.zeros(sizes.slots, np.int32)
            for sequence, tokens in zip(chosen, lists, strict=True):
                q_lens[sequence.slot] = len(tokens)
            ends = np.cumsum(q_lens)
            batch["cu_q_lens"] = np.concatenate([[0], ends]).astype(np.int32)
            grown = {}
            for uid, sequence, tokens in zip(uids, chosen, lists, strict=True):
                slot, seen = sequence.slot, sequence.seen + len(tokens)
                place = slice(ends[slot] - len(tokens), ends[slot])
                batch["tokens"][place] = tokens
                batch["positions"][place] = np.arange(sequence.seen, seen)
                batch["slot_of_token"][place] = slot
                batch["new_pages"][slot] = self._columns(seen) - self._columns(sequence.seen)
                grown[uid] = HeldSequence(slot, seen)
            logits = self._run("put_one" if decodes else "put", core.params, core.state, core.programs.put(batch))
            self._held.by_uid.update(grown)
            interrupted()
            return logits[np.array([sequence.slot for sequence in chosen])]

    def can_schedule(self, uids: Sequence[int], lengths: Sequence[int]) -> SchedulingResult:
        """Whether `put` would take so many tokens of these sequences.

        While requests of the engine wait or run, one slot and the pages of the longest of them are not given away.

        Args:
          uids: names of sequences, each once.
          lengths: how many tokens of each.

        Raises:
          RequestError: a uid comes twice, or a length is not positive.
          EngineError: the pages of a sequence are lost, or those of all are released.
        """
        uids, lengths = _whole_numbers("uids", uids), _whole_numbers("lengths", lengths)
        if len(set(uids)) != len(uids) or len(uids) != len(lengths) or any(length < 1 for length in lengths):
            raise RequestError("give each uid once, and for each how many tokens, at least 1")
        sizes = self._core.sizes
        with self._core.lock:
            free_slots, free_pages = self._room()
            known = [self._known(uid) for uid in uids]
            if len(uids) > sizes.slots:
                return SchedulingResult.BatchSequenceLimitExceeded
            if sum(uid not in self._held.by_uid for uid in uids) > free_slots:
                return SchedulingResult.EngineSequenceLimitExceeded
            if sum(lengths) > sizes.token_budget:
                return SchedulingResult.BatchTokenLimitExceeded
            needed = 0
            for seen, length in zip(known, lengths, strict=True):
                if seen + length > self._longest:
                    return SchedulingResult.SequenceTokenLimitExceeded
                needed += (self._columns(seen + length) - self._columns(seen)) * sizes.groups.count
            return SchedulingResult.KVCacheLimitExceeded if needed > free_pages else SchedulingResult.Success

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many tokens of a sequence fit.

        Args:
          uid: its name; one that is unknown is an empty sequence.
          max_request_tokens: tokens wanted; never more than the context has room for.
          max_request_blocks: pages that they may take, be they free or not.

        Returns:
          Tokens that fit, and pages that they take; (0, 0) for a new sequence when no slot is free.

        Raises:
          RequestError: an argument is negative or no whole number.
          EngineError: the pages of the sequence are lost, or those of all are released.
        """
        uid, wanted, offered = _whole_numbers("arguments of query", [uid, max_request_tokens, max_request_blocks])
        if wanted < 0 or offered < 0:
            raise RequestError(f"query needs numbers of at least 0, got {wanted} tokens and {offered} blocks")
        with self._core.lock:
            free_slots, _ = self._room()
            seen = self._known(uid)
            if uid not in self._held.by_uid and not free_slots:
                return 0, 0
            page_size, groups = self._core.sizes.page_size, self._core.sizes.groups.count
            wanted = min(wanted, self._longest - seen)
            held = self._columns(seen)
            needed = (self._columns(seen + wanted) - held) * groups
            if needed <= offered:
                return wanted, needed
            columns = offered // groups
            return (columns + held) * page_size - seen, columns * groups

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that fit into the last page of a sequence; 0 for one that is unknown.

        Raises:
          EngineError: its pages are lost.
        """
        with self._core.lock:
            seen = self._known(uid)
            return self._columns(seen) * self._core.sizes.page_size - seen

    def flush(self, uid: int) -> None:
        """Forget a sequence and give its pages back; one that is unknown gives a warning."""
        core = self._core
        with core.lock, interrupts_deferred() as interrupted:
            core.drain()
            if uid in self._held.lost:
                self._held.lost.remove(uid)
            elif uid in self._held.by_uid:
                slots = np.zeros(core.sizes.slots, bool)
                slots[self._held.by_uid[uid].slot] = True
                self._run("flush", core.state, core.programs.put(slots))
                del self._held.by_uid[uid]
            else:
                warnings.warn(f"flush: there is no sequence {uid}", stacklevel=3)
            interrupted()

    @property
    def free_blocks(self) -> int:
        """Pages that nobody holds."""
        with self._core.lock:
            self._core.drain()
            state = self._core.require_state()
            return int((np.asarray(state.table.ref_counts) == 0).sum())

    def _run(self, program: str, *arguments: Any) -> Any:
        """Run a program that takes the state and gives the next one; returns what it gives beside it."""
        core = self._core
        try:
            result = core.programs.run(program, *arguments)
        except Exception as error:
            core.recover(error)  # what the program was given is gone
            raise EngineError(core.lost) from error
        core.state, others = result if isinstance(result, tuple) else (result, None)
        return others

    @property
    def _longest(self) -> int:
        sizes = self._core.sizes
        return min(sizes.max_context, sizes.pages_per_slot * sizes.page_size)

    def _columns(self, tokens: int) -> int:
        """Pages that so many tokens fill, of each group of layers."""
        return pages_for(tokens, self._core.sizes.page_size)

    def _known(self, uid: int) -> int:
        """Tokens that a sequence has seen.

        Raises:
          EngineError: they are lost.
        """
        if uid in self._held.lost:
            raise EngineError(f"a fault has cost the pages of sequence {uid}: flush it, and put its whole text again")
        sequence = self._held.by_uid.get(uid)
        return 0 if sequence is None else sequence.seen

    def _room(self) -> tuple[int, int]:
        """Slots and pages that are free, but for what requests need so that the longest of them still goes on."""
        core = self._core
        core.drain()
        reserve = core.most_pages()
        state = core.require_state()
        slots = int((np.asarray(state.slots.sequence) == FREE).sum())
        pages = int((np.asarray(state.table.ref_counts) == 0).sum())
        if reserve:
            slots = min(slots, core.sizes.slots - len(self._held) - 1)
            pages = min(pages, core.sizes.pages - self._held.pages - reserve)
        return slots, max(pages, 0)


def _whole_numbers(name: str, values: Any) -> list[int]:
    """Whole numbers of any kind of sequence, as Python's.

    Raises:
      RequestError: they are not.
    """
    try:
        values = np.asarray(values).tolist() if isinstance(values, np.ndarray | jax.Array) else list(values)
    except TypeError:
        raise RequestError(f"{name} must be a list of whole numbers, got {values!r}") from None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise RequestError(f"{name} must be whole numbers, got {value!r}")
    return [int(value) for value in values]
