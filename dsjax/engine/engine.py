"""The engine: what callers hold."""

import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dsjax import workspace
from dsjax.engine import contract, streams
from dsjax.engine.contract import SchedulingResult
from dsjax.engine.core import Core
from dsjax.engine.outputs import RequestOutput
from dsjax.engine.programs import Sizes
from dsjax.engine.progress import Bar
from dsjax.engine.requests import Request, new_metrics
from dsjax.engine.sampling_params import SamplingParams
from dsjax.engine.setup import check_same, choose_sizes, placed
from dsjax.engine.stats import prometheus
from dsjax.errors import EngineError, QueueFullError, RequestError
from dsjax.params import Params, validate
from dsjax.program_cache import keep_programs

if TYPE_CHECKING:
    from dsjax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

OVERTAKEN = 1024  # later requests that one step of priority lets pass


class Engine:
    """Answers requests that come over time, in a fixed memory.

    The scheduler is the one of `dsjax.generate` and runs on the device, so a request's output is what `generate` gives
    for it alone. What ordinary requests run is compiled before the first one. The engine holds the parameters and its
    state, and nothing global: several live side by side. Methods may be called from any thread.

    Args:
      params: parameter tree, taken as it is. `dsjax.prepare` before makes it faster: it joins products, and lays out
        quantized leaves for a GPU's kernels.
      tokenizer: for prompts that are text, and text that comes out.
      slots: sequences that run at once, default 16 on a CPU and 256 elsewhere.
      token_budget: tokens of a step that reads prompts, default 64 on a CPU and 512 elsewhere; at least `slots`.
      page_size: tokens a page.
      memory_fraction: of the device's memory that the engine may take, weights included; the rest of what is left
        beside weights and temporaries becomes pages. Default 0.9.
      pages: pages in the pool, instead.
      max_context: most tokens of a sequence, prompt included; default the model's, at most 8192.
      mesh: devices to spread parameters and pages over; default where the parameters are.
      steps_per_sync: decode steps of one call of the device, default 1 on a CPU and 8 elsewhere.
      seed: of requests that have none of their own.
      kv_dtype: of the pages, default the embedding's; int8 and `"fp8"` halve them, with scales by token and head.
      max_waiting: requests that may wait; more are refused.
      prefix_caching: find pages of a text again that was read before.
      split_fuse: cut prompts into pieces that are read beside what decodes (Dynamic SplitFuse). Without, whole prompts
        are read alone, and `token_budget` must hold the longest.
      max_logprobs: likeliest tokens that `logprobs` and `prompt_logprobs` may ask for.
      implementation: backend of the kernels; see `dsjax.generate`.
      progress: show a bar while programs compile, and in `generate`; default on a terminal or in a notebook.

    Raises:
      EngineError: the model does not fit; says what is needed and what there is.
      RequestError: sizes that do not go together.
      ParameterError: the tree does not fit its config.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: "Tokenizer | None" = None,
        *,
        slots: int | None = None,
        token_budget: int | None = None,
        page_size: int = 64,
        memory_fraction: float | None = None,
        pages: int | None = None,
        max_context: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        steps_per_sync: int | None = None,
        seed: int = 0,
        kv_dtype: Any = None,
        max_waiting: int = 100_000,
        prefix_caching: bool = True,
        split_fuse: bool = True,
        max_logprobs: int = 20,
        implementation: str | None = None,
        progress: bool | None = None,
    ):
        validate(params)
        params.config.require_head()
        self.config = params.config
        self.tokenizer = tokenizer
        self.max_waiting = max_waiting
        self._progress = progress
        params = placed(params, mesh)
        sizes = choose_sizes(
            params,
            tokenizer,
            slots=slots,
            token_budget=token_budget,
            page_size=page_size,
            max_context=max_context,
            steps_per_sync=steps_per_sync,
            kv_dtype=kv_dtype,
            prefix_caching=prefix_caching,
            split_fuse=split_fuse,
            max_logprobs=max_logprobs,
            implementation=implementation,
        )
        keep_programs()
        begin = time.perf_counter()
        self.plan, programs = workspace.plan(params, sizes, pages, memory_fraction, progress)
        self._core = Core(params, programs, seed)
        try:
            self._core.begin()
        except EngineError as error:
            raise EngineError(f"{self.plan.summary()}: {error}") from error
        self._contract = contract.Contract(self._core)
        self._driver = streams.Driver(self._core)
        self._number_lock = threading.Lock()
        self._number = 0
        self._requests: dict[str, Request] = {}
        self._salt = secrets.randbits(32)
        self.summary = f"{self.plan.summary()}; {programs.num_compiled} programs in {time.perf_counter() - begin:.1f} s"

    def __repr__(self) -> str:
        return f"Engine({self.config.model_type}: {self.summary})"

    # Requests.

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all of them.

        Args:
          prompts: one or a list: text, token ids, or chat messages (`[{"role": "user", "content": "..."}]`).
          params: how to sample, for all or one for each.
          priority: see `add_request`.
          progress: show a bar with tokens a second; default the engine's setting.

        Returns:
          An output for each prompt, in order. One that something raised for has `finish_reason` `"error"` and the
          error; the others are answered.

        Raises:
          RequestError: a prompt or its settings can not be served; then none is.
        """
        batch = _as_batch(prompts)
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} sampling params for {len(batch)} prompts; give one, or one for each")
        requests = [self._request(prompt, given, priority=priority) for prompt, given in zip(batch, each, strict=True)]
        self._check_room(len(requests))
        progress = self._progress if progress is None else progress
        with streams.interrupts_deferred() as interrupted:
            for request in requests:
                self._core.add(request)
            try:
                with Bar(requests, self._core, progress) as bar:
                    while any(not request.finished for request in requests[bar.done :]):
                        self._core.advance()
                        bar.update()
                        interrupted()
            except BaseException:
                for request in requests:
                    self._core.abort(request)
                with contextlib.suppress(EngineError):
                    self._core.advance()
                raise
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Iterator[str]:
        """Answer one prompt, piece by piece.

        A thread runs the engine meanwhile; it lives while anybody listens. Leaving the loop ends the request.

        Args:
          prompt: as for `generate`.
          params: how to sample; `n` must be 1.
          priority: see `add_request`.

        Yields:
          Text; a piece never splits a character, and nothing is shown that a stop text takes back.

        Raises:
          RequestError: it can not be served; at once, not at the first piece.
          EngineError: a step failed.
        """
        self._check_stream(params)
        listener = streams.Listener()
        request = self._request(prompt, params or SamplingParams(), priority=priority, sink=listener.put)
        self._add(request)
        return self._driver.pieces(request, listener)

    def astream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> AsyncIterator[str]:
        """As `stream`, for asyncio: call it inside a running event loop."""
        self._check_stream(params)
        listener = streams.AsyncListener()
        request = self._request(prompt, params or SamplingParams(), priority=priority, sink=listener.put)
        self._add(request)
        return self._driver.apieces(request, listener)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request, for those who call `step` themselves.

        Args:
          prompt: as for `generate`.
          params: how to sample.
          request_id: its name; default one of the engine's.
          priority: lower is served earlier. One step lets 1,024 later requests pass and no more, so nothing starves.

        Returns:
          The name.

        Raises:
          RequestError: it can not be served, or the name is taken.
          QueueFullError: too many wait.
        """
        request = self._request(prompt, params or SamplingParams(), priority=priority, request_id=request_id)
        if request.id in self._requests:
            raise RequestError(f"request_id {request.id!r} is running already")
        self._requests[request.id] = request
        try:
            self._add(request)
        except QueueFullError:
            del self._requests[request.id]
            raise
        return request.id

    def step(self, *, partial: bool = False) -> list[RequestOutput]:
        """One round: queue a call of the device, read the one before.

        Args:
          partial: also return requests of `add_request` that run; else those that ended since the last call.

        Returns:
          Outputs of requests of `add_request`.
        """
        with streams.interrupts_deferred() as interrupted:
            self._core.advance()
            interrupted()
        with self._core.lock:
            requests = list(self._requests.values())  # a copy, since other threads may add some
            ended = [request for request in requests if request.finished]
            for request in ended:
                del self._requests[request.id]
            outputs = [request.output() for request in ended]
            if partial:
                outputs += [request.output(self._core.rows) for request in requests if request.is_live]
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._requests) or self._core.has_work()

    def abort(self, request_id: str) -> None:
        """End a request of `add_request`; `step` returns what it had.

        Raises:
          RequestError: there is none of that name.
        """
        if request_id not in self._requests:
            raise RequestError(f"there is no request {request_id!r} to abort")
        self._core.abort(self._requests[request_id])

    def _request(self, prompt: Prompt, params: SamplingParams, *, priority: int, request_id=None, sink=None) -> Request:
        sizes, config = self._core.sizes, self.config
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling settings must be SamplingParams, got {params!r}")
        text = prompt if isinstance(prompt, str) else None
        tokens = self._tokens(prompt)
        length = len(tokens)
        if length >= sizes.max_context:
            raise RequestError(
                f"a prompt of {length} tokens leaves no room in a context of {sizes.max_context}: shorten it, or make "
                "the engine with a larger max_context"
            )
        params.check(
            config,
            max_logprobs=sizes.alternatives,
            max_stop_ids=sizes.stop_ids - len(self._ends()) + len(config.eos_ids),
            max_logit_bias=sizes.biased_tokens,
            has_tokenizer=self.tokenizer is not None,
        )
        if params.n > sizes.rows:
            raise RequestError(f"n={params.n} samples are more than {sizes.rows}: ask for fewer, or for more slots")
        limit = sizes.max_context - length if params.max_tokens is None else params.max_tokens
        limit = min(limit, sizes.max_context - length)
        if reason := self._core.held.shortage(length, limit):
            raise RequestError(reason)
        with self._number_lock:
            number = self._number
            self._number += params.n
        return Request(
            id=request_id or f"request-{number}",
            number=number,
            prompt=text,
            tokens=tokens,
            params=params,
            limit=limit,
            stop_ids=(() if params.ignore_eos else self._ends()) + tuple(params.stop_token_ids),
            rank=number + OVERTAKEN * priority,
            salt=self._salt_for(length + limit, params),
            metrics=new_metrics(),
            tokenizer=self.tokenizer,
            sink=sink,
        )

    def _ends(self) -> tuple[int, ...]:
        ends = tuple(self.config.eos_ids) + (() if self.tokenizer is None else self.tokenizer.eos_ids)
        return tuple(dict.fromkeys(ends))

    def _salt_for(self, final: int, params: SamplingParams) -> int:
        """Pages are shared between prompts of one salt: of one version of the parameters, and of one rotation."""
        if params.prompt_logprobs is not None:
            return secrets.randbits(32)  # its whole prompt has to be computed
        scaling = self.config.rope_scaling
        if not self.config.scales_by_length or scaling is None:
            return self._salt
        long = final > scaling.original_context
        return (self._salt + (final if long and scaling.kind == "dynamic" else int(long))) % 2**32

    def _tokens(self, prompt: Prompt) -> np.ndarray:
        ids: Any = prompt
        is_chat = isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(part, Mapping) for part in prompt)
        if isinstance(prompt, str) or is_chat:
            if self.tokenizer is None:
                raise RequestError("the engine has no tokenizer: give token ids, or Engine(params, tokenizer)")
            if isinstance(prompt, str):
                ids = self.tokenizer.encode(prompt)
            else:
                ids = self.tokenizer.apply_chat_template(prompt)  # pyright: ignore[reportArgumentType]
        try:
            tokens = np.asarray(ids)
        except ValueError:  # lists of several lengths
            tokens = np.zeros(0)
        if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise RequestError("a prompt must be text, chat messages, or at least one token id (often the bos token)")
        bad = (tokens < 0) | (tokens >= self.config.vocab_size)
        if bad.any():
            place = int(np.argmax(bad))
            raise RequestError(
                f"the prompt has token id {tokens[place]} at position {place}; ids of this model are 0 to "
                f"{self.config.vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def _check_stream(self, params: SamplingParams | None) -> None:
        self._core.require_state()
        if self.tokenizer is None:
            raise RequestError("stream gives text, and the engine has no tokenizer: Engine(params, tokenizer), or step")
        if params is not None and params.n != 1:
            raise RequestError(f"stream follows one sequence, and n={params.n}: use generate")

    def _add(self, request: Request) -> None:
        self._check_room(1)
        self._core.add(request)

    def _check_room(self, count: int) -> None:
        waiting = self._core.num_waiting
        if waiting + count > self.max_waiting:
            raise QueueFullError(
                f"{waiting} requests wait and max_waiting={self.max_waiting}: try again when some have been answered"
            )

    # Sequences that the caller drives: the original's contract.

    def put(self, uids: Sequence[int], token_lists: Sequence[Sequence[int]]) -> jax.Array:
        """Compute tokens of sequences; see `dsjax.engine.contract.Contract.put`."""
        return self._contract.put(uids, token_lists)

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many tokens of a sequence fit; see `dsjax.engine.contract.Contract.query`."""
        return self._contract.query(uid, max_request_tokens, max_request_blocks)

    def can_schedule(self, uids: Sequence[int], lengths: Sequence[int]) -> SchedulingResult:
        """Whether `put` would take tokens; see `dsjax.engine.contract.Contract.can_schedule`."""
        return self._contract.can_schedule(uids, lengths)

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that fit into the last page of a sequence."""
        return self._contract.get_remaining_block_capacity(uid)

    def flush(self, uid: int) -> None:
        """Forget a sequence and give its pages back."""
        self._contract.flush(uid)

    @property
    def free_blocks(self) -> int:
        """Pages that nobody holds; pages with cached prefixes count as free."""
        return self._contract.free_blocks

    def serialize(self, path: Any, *, overwrite: bool = False) -> None:
        """Save parameters and tokenizer as a folder that `dsjax.load` reads; see `dsjax.save`."""
        from dsjax.checkpoint import save

        save(self._core.params, path, tokenizer=self.tokenizer, overwrite=overwrite)

    def warm_up(self) -> None:
        """Compile now what few use, and what else waits for its first use: `put` and `flush`, processors, recovery."""
        self._core.programs.warm_up(everything=True)

    # Parameters and memory.

    @property
    def sizes(self) -> Sizes:
        """What its programs are compiled for."""
        return self._core.sizes

    @property
    def params(self) -> Params:
        """The parameter tree that is used."""
        return self._core.params

    def update(self, params: Params) -> None:
        """Use other values of the parameters from the next step on; nothing compiles.

        What is cached of prefixes is not used with them. Requests that run go on with the keys and values that they
        have.

        Args:
          params: a tree of the same structure, shapes, dtypes and devices.

        Raises:
          ParameterError: it is not.
        """
        check_same(self._core.params, params)
        with self._core.lock:
            self._core.params = params
            self._salt = secrets.randbits(32)

    def release(self) -> None:
        """Give the memory of the pages back, say to train; requests stay and are computed again after `retake`.

        Raises:
          EngineError: sequences of `put` have some of them; names these.
        """
        with self._core.lock:
            if uids := sorted(self._core.held.by_uid):
                raise EngineError(f"can not release the pages while sequences of put hold some: flush {uids}")
            self._core.release()

    def retake(self) -> None:
        """Take the memory of the pages again, after `release` or a fault.

        Raises:
          EngineError: there is no room for them; free some, and call it again.
        """
        with self._core.lock:
            if self._core.state is None:
                self._core.restart()
        self._driver.resume()

    # Watching it.

    def stats(self) -> dict[str, float]:
        """What runs, what waits, and what was done so far, by name."""
        core = self._core
        return core.stats.snapshot(
            waiting=core.num_waiting,
            live=core.num_live,
            held=core.held.pages,
            programs=core.programs.num_compiled,
        )

    def metrics_text(self) -> str:
        """`stats` in the text format of Prometheus."""
        return prometheus(self.stats())

    def profile_model_time(self, enabled: bool = True) -> None:
        """Time every call of the device from now on; costs the overlap of calls."""
        self._core.time_calls(enabled)

    def model_times(self) -> list[float]:
        """Seconds of each call of the device since the last look; cleared by reading.

        Raises:
          EngineError: `profile_model_time` was not called.
        """
        return self._core.model_times()

    @property
    def last_fault(self) -> str:
        """What the last step that failed cost; empty if none did."""
        return self._core.lost


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray | jax.Array):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be text, token ids, chat messages, or a list of these, got {prompts!r}")
    if not len(prompts):
        raise RequestError("there are no prompts")
    first = prompts[0]
    if isinstance(first, int | np.integer | Mapping):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]
