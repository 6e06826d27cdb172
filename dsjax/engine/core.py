"""The engine's loop: what arrives goes to the device, the device runs, what came out goes to who asked.

The device's scheduler decides what runs. The loop only feeds it and reads what it emits, one call late: while a call
runs, the one before is read, and the one after is already queued. So the device never waits for the host.
"""

import dataclasses
import heapq
import logging
import threading
import time
from collections import Counter, deque
from typing import Any

import jax
import numpy as np

from dsjax.engine.compiled import Programs
from dsjax.engine.held import Held
from dsjax.engine.outputs import FinishReason
from dsjax.engine.processors import process
from dsjax.engine.programs import FLAGS, Sizes, unpack
from dsjax.engine.requests import Event, Request, Rows, Sequence
from dsjax.engine.stats import Stats
from dsjax.errors import EngineError, RequestError
from dsjax.params import Params
from dsjax.ragged.groups import pages_for
from dsjax.ragged.state import Finish, Outputs, Queue, State

logger = logging.getLogger("dsjax.engine")

DEPTH = 2  # calls of the device that are queued at once
_REASONS: dict[Finish, FinishReason] = {Finish.STOP: "stop", Finish.LENGTH: "length"}


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of the device whose outputs have not been read."""

    number: int
    packed: jax.Array
    details: Any
    submitted: int  # prompt tokens that the device had been given
    steps: int
    reads: bool


class Core:
    """Requests, the device's state, and the loop between them.

    All of it is done under `lock` by whoever calls `advance`, but for `add` and `abort`, which any thread may call at
    any time without waiting.

    Args:
      params: the parameter tree, on its devices.
      programs: compiled for it.
      seed: of the keys of requests that have no seed.
    """

    def __init__(self, params: Params, programs: Programs, seed: int):
        self.params = params
        self.programs = programs
        self.sizes: Sizes = programs.sizes
        self.stats = Stats(self.sizes)
        self.lock = threading.RLock()
        self.rows = Rows(self.sizes)
        self.queue: Queue | None = None
        self.state: State | None = None
        self.held = Held(self.sizes)
        self.lost = ""  # what the last fault cost
        self._times: list[float] | None = None
        self._key = programs.put(jax.random.key(seed))
        self._inbox: deque[Request] = deque()
        self._aborts: deque[Request] = deque()
        self._heap: list[tuple[float, int, Request]] = []
        self._waiting = 0
        self._entering: deque[Request] = deque()  # whose prompts the device does not have whole
        self._live: set[Request] = set()
        self._needs: Counter[str] = Counter()  # how many live requests ask for what few do
        self._calls: deque[_Call] = deque()
        self._dispatched = self._read = 0
        self._submitted = self._unread = 0
        self._failures = 0

    # What other threads call.

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._inbox.append(request)

    def abort(self, request: Request, error: BaseException | None = None) -> None:
        """End a request, whatever it does."""
        if error is not None and request.error is None:
            request.error = error
        self._aborts.append(request)

    @property
    def num_waiting(self) -> int:
        """Requests that the device does not know of yet."""
        return self._waiting + len(self._inbox)

    @property
    def num_live(self) -> int:
        """Requests that the device knows of."""
        return len(self._live)

    def require_state(self) -> State:
        """The device's state.

        Raises:
          EngineError: the pages have been released.
        """
        if self.state is None:
            raise EngineError("the engine has no pages, released or lost: call engine.retake() first")
        return self.state

    def most_pages(self) -> int:
        """Pages that the longest of all requests may need."""
        self._take_inbox()
        requests = [*self._live, *(entry[2] for entry in self._heap)]
        longest = max((len(request.tokens) + request.limit for request in requests if not request.finished), default=1)
        return self.sizes.groups.peak(pages_for(longest - 1, self.sizes.page_size))

    def has_work(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._inbox or self._aborts or self._waiting or self._live or self._calls)

    # The loop.

    def advance(self) -> None:
        """Take in what arrived, queue a call of the device, read the outputs of one."""
        with self.lock:
            self.require_state()
            begin = time.perf_counter()
            waited = 0.0
            try:
                self._take_inbox()
                self._submit()
                if self._wants_processing():
                    waited = self._process()
                else:
                    dispatched = self._dispatch()
                    if self._calls and (len(self._calls) >= DEPTH or not dispatched):
                        waited = self._collect()
            except Exception as error:
                self.recover(error)
            self.stats.host(time.perf_counter() - begin - waited)

    def drain(self) -> None:
        """Read the outputs of all calls, and tell the device what has ended, so that its pages are free."""
        with self.lock:
            try:
                while self._calls:
                    self._collect()
                self._take_inbox()
                if self.state is not None and (self.rows.packet["flags"] & FLAGS["ends"]).any():
                    self._send()
            except Exception as error:
                self.recover(error)

    def _take_inbox(self) -> None:
        while self._inbox:
            request = self._inbox[0]
            heapq.heappush(self._heap, (request.rank, request.number, request))
            self._waiting += 1  # before it leaves the inbox: at no time does `has_work` miss it
            self._inbox.popleft()
            # Pages may have been taken since it was let in.
            if reason := self.held.shortage(len(request.tokens), request.limit):
                request.error = RequestError(reason)
                self._end_request(request, "error")
        while self._aborts:
            request = self._aborts.popleft()
            if not request.finished:
                self._end_request(request, "abort" if request.error is None else "error")

    def _end_request(self, request: Request, reason: FinishReason) -> None:
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                if sequence.row >= 0:
                    self.rows.end(sequence, on_device=True)
                self._finish(sequence, reason)

    def _submit(self) -> None:
        """Give the device what it does not know, a packet at a time."""
        self.rows.free(self._read)
        while True:
            self._enter()
            flags = self.rows.packet["flags"] & (FLAGS["begins"] | FLAGS["starts"] | FLAGS["ends"])
            if not self._entering and not flags.any():
                return
            self._send()

    def _enter(self) -> None:
        """Give rows to those who wait, first come or as their priority says."""
        while self._heap:
            request = self._heap[0][2]
            if not request.finished and len(request.sequences) > self.rows.num_free:
                return
            heapq.heappop(self._heap)
            if not request.finished:
                self.rows.take(request)
                self._live.add(request)
                self._needs.update(request.needs)
                self._entering.append(request)
                request.sent = 0
                self._waiting -= 1
                self._constrain(request)  # last, since it may fail

    def _send(self) -> None:
        sizes, rows = self.sizes, self.rows
        tokens = np.zeros((3, sizes.packet_tokens), np.int32)
        tokens[1] = sizes.rows
        complete = np.full(sizes.packet_prompts, sizes.rows, np.int32)
        filled = completed = 0
        while self._entering and filled < sizes.packet_tokens and completed < sizes.packet_prompts:
            request = self._entering[0]
            if request.finished:  # aborted on its way in
                self._entering.popleft()
                continue
            row = request.sequences[0].row
            piece = request.tokens[request.sent : request.sent + sizes.packet_tokens - filled]
            place = slice(filled, filled + len(piece))
            tokens[0, place], tokens[1, place] = piece, row
            tokens[2, place] = np.arange(request.sent, request.sent + len(piece))
            request.sent += len(piece)
            filled += len(piece)
            if request.sent == len(request.tokens):
                complete[completed] = row
                completed += 1
                rows.start(request)
                request.metrics.first_scheduled_time = time.perf_counter()
                self._submitted += len(request.tokens)
                self._unread += len(request.tokens)
                self._entering.popleft()
        rows.put_in_order()
        packet = rows.packet.view(np.int32).reshape(sizes.rows, -1)
        with jax.profiler.TraceAnnotation("dsjax.submit"):
            self.queue, self.state = self.programs.run(
                "submit", self.queue, self.state, *self.programs.put((packet.copy(), tokens, complete)), self._key
            )
        rows.sent()

    def _constrain(self, request: Request) -> None:
        """Tell the device which tokens a request favours or allows; and forget what the row's last one did."""
        row, params = request.sequences[0].row, request.params
        wanted = bool(params.logit_bias) or params.allowed_token_ids is not None
        if not wanted and row not in self.rows.constrained:
            return
        sizes, config = self.sizes, self.params.config
        ids = np.full(sizes.biased_tokens, -1, np.int32)
        values = np.zeros(sizes.biased_tokens, np.float32)
        bias = params.logit_bias or {}
        ids[: len(bias)], values[: len(bias)] = list(bias.keys()), list(bias.values())
        allowed = np.full(-(-config.vocab_size // 32), 0xFFFFFFFF, np.uint32)
        if params.allowed_token_ids is not None:
            bits = np.zeros(len(allowed) * 32, np.uint8)
            bits[list(params.allowed_token_ids)] = 1
            allowed = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
        arguments = self.programs.put((np.int32(row), ids, values, allowed))
        self.queue = self.programs.run("constrain", self.queue, *arguments)
        (self.rows.constrained.add if wanted else self.rows.constrained.discard)(row)

    def _may_run(self) -> bool:
        """Whether a further call can have anything to do; what the host does not know yet counts as if it had."""
        rows = self.rows
        steps = sum(call.steps for call in self._calls)
        expected = rows.lengths + np.where(rows.lengths > 0, steps, 0)
        return bool((rows.active & (expected < rows.packet["limit"])).any())

    def _dispatch(self) -> bool:
        if not self._may_run():
            return False
        reads = self._unread > 0
        begin = time.perf_counter()
        assert self.queue is not None and self.state is not None
        with jax.profiler.StepTraceAnnotation("dsjax.call", step_num=self._dispatched):
            self.state, packed, details = self.programs.call(
                self.params, self.queue, self.state, decodes=not reads, full=self._needs_full()
            )
        if self._times is not None:
            jax.block_until_ready(packed)
            self._times.append(time.perf_counter() - begin)
        self._add_call(packed, details, reads)
        return True

    def _add_call(self, packed, details, reads: bool) -> None:
        if hasattr(packed, "copy_to_host_async"):
            packed.copy_to_host_async()
        self._dispatched += 1
        steps = 1 if reads else self.sizes.steps_per_sync
        self._calls.append(_Call(self._dispatched, packed, details, self._submitted, steps, reads))
        if reads:
            self._unread -= self.sizes.token_budget

    def _needs_full(self) -> bool:
        return not self.sizes.always_full and self._needs["full"] > 0

    def _collect(self) -> float:
        """Read the outputs of the oldest call; returns the seconds that the device took for it."""
        call = self._calls.popleft()
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation("dsjax.wait"):
            packed = np.asarray(call.packed)
        waited = time.perf_counter() - begin
        with jax.profiler.TraceAnnotation("dsjax.read"):
            self._take_outputs(call, packed)
        self._failures = 0
        return waited

    def _take_outputs(self, call: _Call, packed: np.ndarray) -> None:
        rows = self.rows
        steps, status, cached = unpack(packed, self.sizes)
        self._read = call.number
        later = sum(self.sizes.token_budget for other in self._calls if other.reads)
        self._unread = status["pending"] + self._submitted - call.submitted - later
        sequence, token, logprob, finish = steps.transpose(1, 0, 2)
        emitted = sequence < self.sizes.rows
        num_emitted = int(emitted.sum())
        emitted &= rows.active[np.minimum(sequence, self.sizes.rows - 1)]
        row_of_slot = np.where(emitted, sequence, self.sizes.rows).min(axis=0)
        slots = np.flatnonzero(row_of_slot < self.sizes.rows)
        taken = row_of_slot[slots]
        before = rows.lengths[taken]
        place = np.cumsum(emitted[:, slots], axis=0) + before - 1
        is_new = emitted[:, slots]
        owner = np.broadcast_to(taken, is_new.shape)[is_new]
        rows.tokens[owner, place[is_new]] = token[:, slots][is_new]
        rows.logprobs[owner, place[is_new]] = logprob[:, slots][is_new].view(np.float32)
        rows.lengths[taken] = before + is_new.sum(axis=0)
        self.stats.call(call.reads, len(owner), num_emitted - int((before == 0).sum()), status)
        if len(owner):
            self._rank(call, sequence, is_new, slots)
            ended = np.where(is_new, finish[:, slots], 0).max(axis=0)
            now = time.perf_counter()
            for row in taken[before == 0].tolist():
                metrics = self._of(row).request.metrics
                metrics.first_token_time = metrics.first_token_time or now
                self._of(row).cached = int(cached[row])
            told = rows.watched[taken] | (ended != Finish.RUNNING)
            for row, reason, begin in zip(
                taken[told].tolist(), ended[told].tolist(), before[told].tolist(), strict=True
            ):
                self._tell(row, begin, Finish(reason))
        else:
            self._rank(call, sequence, is_new, slots)
        rows.free(self._read)

    def _of(self, row: int) -> Sequence:
        sequence = self.rows.sequences[row]
        assert sequence is not None
        return sequence

    def _tell(self, row: int, begin: int, finish: Finish) -> None:
        """Look at the new tokens of one sample: its text, whether it ends, who listens."""
        sequence, rows = self._of(row), self.rows
        tokens = rows.tokens[row, begin : rows.lengths[row]].tolist()
        reason = _REASONS.get(finish)
        text = ""
        if sequence.text is not None:
            text = sequence.text.push(tokens, stop_id=reason == "stop", final=reason is not None)
            if sequence.text.stopped is not None:
                rows.lengths[row] = sequence.text.tokens_used
                tokens = tokens[: max(0, sequence.text.tokens_used - begin)]
                sequence.stop_reason = sequence.text.stopped
        if sequence.stop_reason is None and reason == "stop" and tokens[-1] in sequence.request.params.stop_token_ids:
            sequence.stop_reason = tokens[-1]
        stopped = sequence.text is not None and sequence.text.stopped is not None
        if reason is not None or stopped:
            rows.end(sequence, on_device=reason is None)
            self._finish(sequence, "stop" if stopped or reason is None else reason, text, tokens)
        elif sequence.request.sink is not None and tokens:
            sequence.request.sink(Event(sequence.index, text, tokens, None))

    def _finish(
        self, sequence: Sequence, reason: FinishReason, text: str = "", tokens: list[int] | None = None
    ) -> None:
        request = sequence.request
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if reason in ("abort", "error") and sequence.text is not None:
            text += sequence.text.push([], final=True)
        metrics = request.metrics
        metrics.output_tokens = max(metrics.output_tokens, len(sequence.tokens))
        if request.finished:
            metrics.finished_time = time.perf_counter()
            if request.is_live:
                self._live.discard(request)
                self._needs.subtract(request.needs)
                self.rows.retire(request, self._dispatched)
            elif request.sequences[0].row < 0:
                self._waiting -= 1
            self.stats.finished(request)
        if request.sink is not None:
            request.sink(Event(sequence.index, text, tokens or [], reason, request.error))

    def _rank(self, call: _Call, sequence: np.ndarray, is_new: np.ndarray, slots: np.ndarray) -> None:
        """Note likely tokens beside those generated, and those of prompts, for who wants them."""
        if not self._needs["ranks"]:
            return
        ranked, prompt_place, prompt_ranked = jax.device_get(call.details)
        if ranked is not None:
            for step, column in np.argwhere(is_new):
                slot = slots[column]
                owner = self._of(int(sequence[step, slot]))
                if owner.request.params.logprobs is not None:
                    entry = ranked.tokens[step, slot], ranked.logprobs[step, slot], int(ranked.rank[step, slot])
                    owner.ranked.append(entry)
        if prompt_ranked is not None:
            prompt_place, prompt_ranked = jax.tree.map(lambda x: x[0], (prompt_place, prompt_ranked))
            for i in np.flatnonzero(prompt_place[:, 0] < self.sizes.rows):
                owner = self.rows.sequences[prompt_place[i, 0]]
                if owner is not None:
                    entry = prompt_ranked.chosen[i], prompt_ranked.tokens[i], prompt_ranked.logprobs[i]
                    owner.request.prompt_ranked[int(prompt_place[i, 1])] = (*entry, int(prompt_ranked.rank[i]))

    # Processors of logits: the host is in the middle of each step.

    def _wants_processing(self) -> bool:
        return self._needs["processor"] > 0

    def _process(self) -> float:
        """One step with the host's functions between logits and sampling; nothing overlaps."""
        self.drain()
        if not self._may_run():
            return 0.0
        begin = time.perf_counter()
        self.state, batch, logits, prompt_ranks = self.programs.run("look", self.params, self.queue, self.state)
        assert self.state is not None
        owners, starts = np.asarray(self.state.slots.sequence), np.asarray(self.state.slots.context)
        q_lens, changed = np.diff(np.asarray(batch.cu_q_lens)), np.array(logits)
        waited = time.perf_counter() - begin
        for request, error in process(self.rows, owners, starts, q_lens, changed):
            request.error = error
            self._end_request(request, "error")
        self.state, packed, ranked = self.programs.run(
            "conclude", self.queue, self.state, batch, logits, self.programs.put(changed)
        )
        if self._times is not None:
            jax.block_until_ready(packed)
            self._times.append(time.perf_counter() - begin)
        self._add_call(packed, (ranked, *prompt_ranks), reads=True)
        return waited + self._collect()

    # Beginning, faults, and the memory of pages.

    def begin(self) -> None:
        """Make empty pages, and no requests on the device.

        Raises:
          EngineError: there is no room for them.
        """
        self.held.lose()
        self.stats.restarted()
        self.queue = self.state = None  # so that there are never two pools
        try:
            self.queue, self.state = jax.block_until_ready(
                (self.programs.run("empty_queue"), self.programs.run("empty_state"))
            )
        except Exception as error:
            raise EngineError(
                f"there is no room for the pages ({type(error).__name__}: {error}): free what else is in the device's "
                "memory, or make the engine with fewer pages or a lower memory_fraction"
            ) from error

    def release(self) -> None:
        """Give the pages back; requests stay, and are computed again afterwards."""
        with self.lock:
            self.drain()
            jax.block_until_ready((self.queue, self.state))  # what still runs holds their memory
            self.queue = self.state = None

    def restart(self) -> None:
        """New pages, with every request that the host knows put back to be computed again.

        Raises:
          EngineError: they can not be made; then there are none.
        """
        with self.lock:
            self._calls.clear()
            self._read = self._dispatched
            self._unread = 0
            self.begin()
            self.rows.free(self._read)
            self.rows.sent()  # what was said to the device before means nothing to it now
            try:
                if self._live:
                    self._put_back()
            except Exception as error:
                self.queue = self.state = None
                raise EngineError(f"requests could not be put back ({type(error).__name__}: {error})") from error

    def _put_back(self) -> None:
        """Tell a device that knows of nothing what the host knows of live requests."""
        assert self.queue is not None and self.state is not None
        sizes, rows, put = self.sizes, self.rows, self.programs.put
        prompts = np.zeros((sizes.rows, sizes.max_context), np.int32)
        texts = np.zeros((sizes.rows, sizes.max_context), np.int32)
        known = np.zeros(sizes.rows, np.int32)
        for request in self._live:
            whole = request not in self._entering
            for sequence in request.sequences:
                row, length = sequence.row, len(request.tokens) if whole else 0
                prompts[row, :length] = texts[row, :length] = request.tokens[:length]
                known[row] = length + rows.lengths[row]
                texts[row, length : known[row]] = rows.tokens[row, : rows.lengths[row]]
            if not whole:
                request.sent = 0
                for sequence in request.sequences:
                    rows.packet["flags"][sequence.row] |= FLAGS["begins"]
        rows.constrained.clear()
        for request in self._live:
            self._constrain(request)
        finish = np.where(rows.active, Finish.RUNNING, Finish.ABORTED).astype(np.int32)
        tokens, lengths, finish, flat, texts, known, salts = put(
            (
                rows.tokens.copy(),
                rows.lengths.copy(),
                finish,
                prompts.reshape(-1),
                texts,
                known,
                rows.packet["salt"].view(np.uint32),
            )
        )
        self.queue = dataclasses.replace(self.queue, tokens=flat)
        outputs = Outputs(tokens, None, None, lengths, finish)
        self.state = dataclasses.replace(self.state, outputs=outputs)
        self.state = self.programs.run("restart", self.state, texts, known, salts)
        self._unread = int(known.sum())
        self._send()

    def recover(self, error: Exception) -> None:
        """After a call failed its state is gone: begin anew, with everything computed again that the host knows of."""
        self._failures += 1
        running = [request for request in self._live if not request.finished]
        self.lost = (
            f"a step failed ({type(error).__name__}: {error}); the keys and values of {len(running)} requests, of "
            f"{len(self.held)} sequences of put, and all cached prefixes were lost"
        )
        self._calls.clear()
        if self._failures > 1:
            # It was not a passing fault, and whose it is can not be told.
            for request in running:
                failure = EngineError(f"a step failed twice: {type(error).__name__}: {error}")
                failure.__cause__ = error
                request.error = failure
                self._end_request(request, "error")
            self.lost += f"; it failed again, and {len(running)} requests were given up"
        logger.error("%s", self.lost)
        self.stats.fault()
        self._entering = deque(request for request in self._entering if not request.finished)
        try:
            self.restart()
        except Exception as second:
            self.fail(second)
            self.lost += "; so were all requests, since there are no new pages"
            raise EngineError(
                f"the engine can not go on after a failed step ({second}): call engine.retake() to try again"
            ) from error

    def fail(self, error: BaseException) -> None:
        """End all requests with an error; the engine itself can go on if it has pages."""
        with self.lock:
            self._take_inbox()
            failure = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            for request in [*self._live, *(entry[2] for entry in self._heap)]:
                if not request.finished:
                    request.error = failure
                    self._end_request(request, "error")
            self._entering.clear()

    # Timing of calls, as the original's `profile_model_time`.

    def time_calls(self, enabled: bool) -> None:
        """Wait for each call of the device, and note how long it took."""
        self._times = [] if enabled else None

    def model_times(self) -> list[float]:
        """Seconds of each call since the last look.

        Raises:
          EngineError: calls are not timed.
        """
        if self._times is None:
            raise EngineError("calls are not timed: engine.profile_model_time() first")
        times, self._times = self._times, []
        return times
