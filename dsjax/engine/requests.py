"""Requests as the host knows them, and its copy of the rows that the device keeps of them."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dsjax.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from dsjax.engine.programs import FLAGS, Sizes, packet_dtype
from dsjax.engine.sampling_params import SamplingParams
from dsjax.engine.text import TextStream

if TYPE_CHECKING:
    from dsjax.tokenizer import Tokenizer

NONE = np.zeros(0, np.int32)
_DEFAULT = SamplingParams()


@dataclasses.dataclass(eq=False)
class Sequence:
    """One sample of one request.

    Attributes:
      request: whose.
      index: which sample of it.
      row: where the device keeps it; -1 before and after.
      finish_reason: `None` while it runs.
      stop_reason: the id or string that ended it, if one did.
      text: follows it token by token, if somebody has to.
      tokens: generated ids, once it has ended.
      logprobs: of these.
      cached: tokens of its prompt that were found in the prefix cache.
      ranked: likely tokens of each, if asked for: ids, log-probabilities, and the rank of the one generated.
    """

    request: "Request"
    index: int
    row: int = -1
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: TextStream | None = None
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
    logprobs: np.ndarray = dataclasses.field(default_factory=lambda: NONE)
    cached: int = 0
    ranked: list[tuple[np.ndarray, np.ndarray, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Request:
    """What somebody asked for.

    Attributes:
      id: its name.
      number: place in the order of arrival; the siblings of a prompt follow each other.
      prompt: its text, if it came as one.
      tokens: `int32[L]`, ids of the prompt.
      params: how to sample.
      limit: most new tokens.
      stop_ids: ids that end it, the model's own included.
      rank: what it is served by, lowest first.
      salt: prompts with different ones share no pages.
      sequences: its samples.
      sink: told of new text and of the end, if anybody listens.
      sent: tokens of the prompt that the device has.
      error: what ended it, if something did.
      prompt_ranked: by position in the prompt: likely tokens, as in `Sequence.ranked`, and its own log-probability.
    """

    id: str
    number: int
    prompt: str | None
    tokens: np.ndarray
    params: SamplingParams
    limit: int
    stop_ids: tuple[int, ...]
    rank: float
    salt: int
    metrics: RequestMetrics
    tokenizer: "Tokenizer | None"
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    sink: "Callable[[Event], None] | None" = None
    sent: int = 0
    error: BaseException | None = None
    prompt_ranked: dict[int, tuple] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        follow = self.sink is not None or bool(self.params.stop)
        for index in range(self.params.n):
            text = TextStream(self.tokenizer, self.params) if follow and self.tokenizer is not None else None
            self.sequences.append(Sequence(self, index, text=text))

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """What it asks for that most do not: a program with all features, rankings, a processor of logits."""
        params = self.params
        names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "logit_bias")
        rare = any(getattr(params, name) != getattr(_DEFAULT, name) for name in (*names, "allowed_token_ids"))
        ranks = params.logprobs is not None or params.prompt_logprobs is not None
        asked = {"full": rare or ranks, "ranks": ranks, "processor": params.logits_processor is not None}
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def finished(self) -> bool:
        """Whether all its samples have ended."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def is_live(self) -> bool:
        """Whether the device knows of it."""
        return self.sequences[0].row >= 0

    def output(self, rows: "Rows | None" = None) -> RequestOutput:
        """The request as its caller sees it, so far.

        Args:
          rows: where samples that still run have their tokens.
        """
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._entry(i) for i in range(1, len(self.tokens)))]
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.tokens.tolist(),
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(sequence, rows) for sequence in self.sequences],
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=max(sequence.cached for sequence in self.sequences),
        )

    def _entry(self, position: int) -> dict[int, Logprob] | None:
        if position not in self.prompt_ranked:
            return None
        chosen, ids, logprobs, rank = self.prompt_ranked[position]
        count = self.params.prompt_logprobs or 0
        return self._logprobs(int(self.tokens[position]), chosen, ids[:count], logprobs[:count], rank)

    def _logprobs(self, token: int, chosen: float, ids, logprobs, rank: int) -> dict[int, Logprob]:
        def decoded(token):
            return None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)

        entries = {token: Logprob(float(chosen), int(rank), decoded(token))}
        for place, (other, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True), start=1):
            entries.setdefault(other, Logprob(logprob, place, decoded(other)))
        return entries

    def _completion(self, sequence: Sequence, rows: "Rows | None") -> CompletionOutput:
        tokens, chosen = sequence.tokens, sequence.logprobs
        if rows is not None and sequence.row >= 0 and sequence.finish_reason is None:
            tokens, chosen = rows.generated(sequence.row)
        if sequence.text is not None:
            text = sequence.text.text
        else:
            stream = TextStream(self.tokenizer, self.params)
            ended = sequence.finish_reason
            text = stream.push(tokens.tolist(), stop_id=ended == "stop", final=ended is not None)
        logprobs = None
        if self.params.logprobs is not None:
            count = self.params.logprobs
            logprobs = [
                self._logprobs(int(token), float(own), ids[:count], likely[:count], rank)
                for token, own, (ids, likely, rank) in zip(tokens, chosen, sequence.ranked, strict=False)
            ]
        return CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=tokens.tolist(),
            cumulative_logprob=float(chosen.sum(dtype=np.float64)),
            token_logprobs=chosen.tolist(),
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            error=self.error,
        )


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one sample: what its listener gets.

    Attributes:
      index: which sample.
      text: characters that can be shown now.
      tokens: new ids.
      finish_reason: `None` while it runs.
      error: what ended it, if something did.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
    error: BaseException | None = None


class Rows:
    """The host's copy of the device's rows: what it says of them, and what came out of them.

    Attributes:
      packet: `packet_dtype[R]`, as it was last sent or will be.
      tokens: `int32[R, C]`, generated.
      logprobs: `float32[R, C]`, of these.
      lengths: `int32[R]`, how many.
      active: `bool[R]`, whether tokens of it are still wanted.
      watched: `bool[R]`, whether its tokens are looked at one by one.
      sequences: whose row it is.
    """

    def __init__(self, sizes: Sizes):
        rows = sizes.rows
        self.packet = np.zeros(rows, packet_dtype(sizes))
        self.packet["length"] = 1
        self.packet["prompt"] = np.arange(rows)
        # Memory of these is only taken where it is written.
        self.tokens = np.zeros((rows, sizes.max_context), np.int32)
        self.logprobs = np.zeros((rows, sizes.max_context), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.active = np.zeros(rows, bool)
        self.watched = np.zeros(rows, bool)
        self.rank = np.full(rows, np.inf)
        self.number = np.zeros(rows, np.int64)
        self.sequences: list[Sequence | None] = [None] * rows
        self.constrained: set[int] = set()
        self._free = deque(range(rows))
        self._retired: deque[tuple[int, list[int]]] = deque()

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def generated(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities of a row so far."""
        length = self.lengths[row]
        return self.tokens[row, :length].copy(), self.logprobs[row, :length].copy()

    def take(self, request: Request) -> None:
        """Give a row to each sample of a request, and write down what it wants."""
        rows = [self._free.popleft() for _ in request.sequences]
        params = request.params
        entry = self.packet[rows[0]]
        entry["length"] = len(request.tokens)
        entry["top_k"] = max(params.top_k, 0)
        entry["salt"] = np.uint32(request.salt).view(np.int32)
        entry["seed"] = np.uint32((request.number if params.seed is None else params.seed) & 0xFFFFFFFF).view(np.int32)
        for name in ("min_tokens", "temperature", "top_p", "min_p", "repetition_penalty"):
            entry[name] = getattr(params, name)
        for name in ("presence_penalty", "frequency_penalty"):
            entry[name] = getattr(params, name)
        entry["stop_ids"] = -1
        entry["stop_ids"][: len(request.stop_ids)] = request.stop_ids
        flags = FLAGS["begins"]
        flags |= FLAGS["seeded"] * (params.seed is not None)
        flags |= FLAGS["alternatives"] * (params.logprobs is not None)
        flags |= FLAGS["prompt"] * (params.prompt_logprobs is not None)
        for sequence, row in zip(request.sequences, rows, strict=True):
            sequence.row = row
            self.sequences[row] = sequence
            # That its last owner ended may not have been said yet; a packet can say both.
            ends = self.packet["flags"][row] & FLAGS["ends"]
            if row != rows[0]:
                self.packet[row] = entry
            self.packet["prompt"][row] = rows[0]
            self.packet["sample"][row] = sequence.index
            self.packet["limit"][row] = request.limit
            self.packet["flags"][row] = flags | ends
            self.lengths[row] = 0
            self.rank[row], self.number[row] = request.rank, request.number + sequence.index
            self.watched[row] = sequence.text is not None or request.sink is not None or params.logprobs is not None

    def start(self, request: Request) -> None:
        """Its prompt is whole: let it run."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.packet["flags"][sequence.row] |= FLAGS["starts"]
                self.active[sequence.row] = True

    def end(self, sequence: Sequence, on_device: bool) -> None:
        """No more tokens of a sample are wanted.

        Args:
          sequence: the sample.
          on_device: the device does not know yet.
        """
        row = sequence.row
        sequence.tokens, sequence.logprobs = self.generated(row)
        self.active[row] = False
        if on_device:
            self.packet["flags"][row] |= FLAGS["ends"]

    def retire(self, request: Request, call: int) -> None:
        """Take all rows of a request back once the outputs of a call were read, which may still name them."""
        rows = [sequence.row for sequence in request.sequences]
        for sequence in request.sequences:
            self.sequences[sequence.row] = None
            self.rank[sequence.row] = np.inf
            sequence.row = -1
        self._retired.append((call, rows))

    def free(self, read: int) -> None:
        """Free rows that were retired before a call whose outputs have now been read."""
        while self._retired and self._retired[0][0] <= read:
            self._free.extend(self._retired.popleft()[1])

    def sent(self) -> None:
        """What is said but once has been said."""
        self.packet["flags"] &= ~(FLAGS["begins"] | FLAGS["starts"] | FLAGS["ends"])

    def put_in_order(self) -> None:
        """Number the rows in the order to serve them."""
        order = np.lexsort((self.number, self.rank))
        self.packet["order"][order] = np.arange(len(order))


def new_metrics() -> RequestMetrics:
    """Those of a request that arrives now."""
    return RequestMetrics(arrival_time=time.perf_counter())
