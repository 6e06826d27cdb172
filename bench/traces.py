"""Random traces: requests that come, go and are taken back in any order, and what each of them must give.

What a request gives is computed without the engine, by `dsjax.generate`, for whole batches of fixed shapes; settings
that `generate` does not have are asked of another engine, one request at a time. Those answers are as long as any
trace needs; where a request ends (its limit, its stop ids, its stop text) is worked out here, in plain Python.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsjax
from dsjax import testing
from dsjax.engine.contract import SchedulingResult
from dsjax.errors import RequestError
from dsjax.ragged.state import FREE, Finish

CONTEXT = 64  # of the engines
LONGEST = 56  # prompt tokens
NEW = 24  # most new tokens of a request
SAMPLES = 4  # most samples of a request
BATCH = 32  # requests of one call of `generate`
TOLERANCE = 1e-4  # of log-probabilities

# Pools so small that sequences are put back, and budgets that cut prompts to pieces.
ENGINES: dict[str, dict[str, Any]] = {
    "tiny": dict(slots=4, token_budget=8, page_size=8, pages=9, steps_per_sync=1),
    "ahead": dict(slots=3, token_budget=16, page_size=4, pages=17, steps_per_sync=3),
    "single": dict(slots=1, token_budget=1, page_size=16, pages=4, steps_per_sync=2),
    "whole": dict(slots=4, token_budget=64, page_size=4, pages=17, steps_per_sync=2, split_fuse=False),
    "uncached": dict(slots=4, token_budget=8, page_size=8, pages=10, steps_per_sync=1, prefix_caching=False),
    "window": dict(slots=4, token_budget=8, page_size=4, pages=25, steps_per_sync=2),
}
_ROOMY: dict[str, Any] = dict(slots=5, token_budget=64, page_size=16, pages=20, prefix_caching=False)
_PLAIN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@functools.cache
def model(window: bool = False, version: int = 0) -> dsjax.Params:
    """Parameters of a tiny model; versions differ in their values alone."""
    config = testing.tiny_config(windows=(None, 7) if window else ())
    return testing.tiny_params(config, seed=version)


def make_engine(name: str) -> dsjax.Engine:
    """One of `ENGINES`."""
    return dsjax.Engine(model(name == "window"), testing.tiny_tokenizer(), max_context=CONTEXT, **ENGINES[name])


def add_bias(tokens: list[int], logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A processor of logits that does what `logit_bias` does."""
    return np.asarray(logits) + bias


@dataclasses.dataclass(frozen=True)
class Kind:
    """A prompt and how it is continued; traces choose how long, how often and when."""

    tokens: tuple[int, ...]
    settings: dict[str, Any]  # of `SamplingParams`
    is_plain: bool  # `generate` has all of the settings

    @property
    def seeded(self) -> bool:
        """Whether the answer does not depend on the engine's own keys."""
        return self.settings["seed"] is not None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one sample gives: tokens, their log-probabilities, its text, and why it ended."""

    tokens: list[int]
    logprobs: np.ndarray
    text: str
    finish_reason: str
    stop_reason: int | str | None


class Pool:
    """Kinds of requests, and their answers under each version of the parameters.

    Args:
      seed: of what they are.
      size: how many.
      window: of the model with sliding windows.
      processors: some have a processor of logits.
    """

    def __init__(self, seed: int, size: int = 64, window: bool = False, processors: bool = True):
        self._window = window
        self._tokenizer = testing.tiny_tokenizer()
        self._config = model(window).config
        self._answers: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._texts: dict[bytes, list[str]] = {}
        self._roomy: dsjax.Engine | None = None
        rng = np.random.default_rng(seed)
        # Prompts are beginnings of few texts, with or without an end of their own.
        texts = rng.integers(2, self._config.vocab_size, (max(2, size // 12), LONGEST))
        self.kinds = [self._draw(rng, texts, processors) for _ in range(size)]
        self._choose_ends(rng)

    def _draw(self, rng: np.random.Generator, texts: np.ndarray, processors: bool) -> Kind:
        vocab = self._config.vocab_size
        tokens = texts[rng.integers(len(texts)), : rng.integers(1, LONGEST + 1)].copy()
        own = int(rng.choice([0, 0, 1, 5]))
        tokens[max(0, len(tokens) - own) :] = rng.integers(2, vocab, min(own, len(tokens)))
        settings: dict[str, Any] = dict(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 0, 20])),
            top_p=float(rng.choice([1.0, 1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.0, 0.01])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
            seed=int(rng.integers(2**32)) if rng.random() < 0.9 else None,
            ignore_eos=bool(rng.random() < 0.3),
        )
        if rng.random() < 0.2:
            ids = rng.choice(vocab, 5, replace=False)
            settings["logit_bias"] = {int(i): float(rng.choice([-np.inf, -2.0, 3.0])) for i in ids}
        elif processors and rng.random() < 0.04:
            bias = rng.normal(0, 2, vocab).astype(np.float32)
            settings["logits_processor"] = functools.partial(add_bias, bias=bias)
        is_plain = not settings["seed"] or rng.random() < 0.75
        if not is_plain:
            settings["presence_penalty"] = float(rng.choice([0.0, 0.8]))
            settings["frequency_penalty"] = float(rng.choice([0.0, 0.5]))
            if rng.random() < 0.5:
                settings["allowed_token_ids"] = np.flatnonzero(rng.random(vocab) < 0.3).tolist()
        return Kind(tuple(tokens.tolist()), settings, is_plain)

    def _choose_ends(self, rng: np.random.Generator) -> None:
        """Give kinds stop ids and stop texts that they do come to, and a minimum to those that are not plain."""
        for i, (tokens, _) in enumerate(self.answers(0)):
            settings = self.kinds[i].settings
            chosen = tokens[rng.integers(SAMPLES), rng.integers(NEW, size=2)].tolist()
            text = self._tokenizer.decode(chosen[:1])
            ends = rng.choice(["none", "ids", "text"], p=[0.4, 0.3, 0.3])
            if ends == "ids":
                settings["stop_token_ids"] = tuple(dict.fromkeys(chosen))
            elif ends == "text" and text.isascii() and text:
                settings["stop"] = (text, "\x00never")
            if not self.kinds[i].is_plain and rng.random() < 0.5 and "stop" not in settings:
                settings["min_tokens"] = int(rng.integers(1, 6))
                settings.pop("ignore_eos")
                self._answers.clear()  # no stop id is drawn before so many

    def answers(self, version: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each kind `int32[SAMPLES, NEW]` tokens and their log-probabilities, with nothing that ends them."""
        if version not in self._answers:
            answers: list[Any] = [None] * len(self.kinds)
            plain = [i for i, kind in enumerate(self.kinds) if kind.is_plain]
            keys = [jax.random.key(self.kinds[i].settings["seed"] or 0) for i in plain]
            for i, answer in zip(plain, self.generate(version, [self.kinds[i] for i in plain], keys), strict=True):
                answers[i] = answer
            for i, kind in enumerate(self.kinds):
                if not kind.is_plain:
                    answers[i] = self._ask_alone(version, kind)
            self._answers[version] = answers
        return self._answers[version]

    def generate(self, version: int, kinds: list[Kind], keys: list[jax.Array]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Answers of `dsjax.generate`, with these keys."""
        answers = []
        for begin in range(0, len(kinds), BATCH):
            part = kinds[begin : begin + BATCH]
            part = part + [part[-1]] * (BATCH - len(part))
            chosen = [*keys[begin : begin + BATCH], *[jax.random.key(0)] * BATCH][:BATCH]
            tokens = np.zeros((BATCH, LONGEST), np.int32)
            bias = np.zeros((BATCH, self._config.vocab_size), np.float32)
            for row, kind in enumerate(part):
                tokens[row, : len(kind.tokens)] = kind.tokens
                if "logits_processor" in kind.settings:
                    bias[row] = kind.settings["logits_processor"].keywords["bias"]
                for token, value in kind.settings.get("logit_bias", {}).items():
                    bias[row, token] = value
            settings: dict[str, Any] = {name: np.array([kind.settings[name] for kind in part]) for name in _PLAIN}
            out = dsjax.generate(
                model(self._window, version),
                tokens,
                np.array([len(kind.tokens) for kind in part], np.int32),
                max_new_tokens=NEW,
                key=jnp.stack(chosen),
                n=SAMPLES,
                ignore_eos=True,
                logit_bias=bias,
                slots=64,
                token_budget=512,
                **settings,
            )
            answers += list(zip(np.asarray(out.tokens), np.asarray(out.logprobs), strict=True))[: len(keys) - begin]
        return answers

    def _ask_alone(self, version: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
        if self._roomy is None:
            self._roomy = dsjax.Engine(model(self._window), max_context=128, **_ROOMY)
        if self._roomy.params is not model(self._window, version):
            self._roomy.update(model(self._window, version))
        settings = {name: value for name, value in kind.settings.items() if name != "stop"}
        if "min_tokens" not in settings:
            settings |= {"ignore_eos": True, "stop_token_ids": ()}
        params = dsjax.SamplingParams(n=SAMPLES, max_tokens=NEW, **settings)
        (out,) = self._roomy.generate([list(kind.tokens)], params, progress=False)
        tokens, logprobs = np.zeros((2, SAMPLES, NEW))
        for i, sample in enumerate(out.outputs):
            tokens[i, : len(sample.token_ids)] = sample.token_ids
            logprobs[i, : len(sample.token_ids)] = sample.token_logprobs
        return tokens.astype(np.int32), logprobs.astype(np.float32)

    def answer(self, kind: Kind, tokens: np.ndarray, logprobs: np.ndarray, limit: int) -> Answer:
        """Where one sample ends, of all that it would give."""
        settings = kind.settings
        texts = self._texts.setdefault(tokens.tobytes(), [])
        if not texts:
            texts += [self._tokenizer.decode(tokens[:count].tolist()) for count in range(NEW + 1)]
        own = () if settings.get("ignore_eos") else (*self._config.eos_ids, *self._tokenizer.eos_ids)
        stop_ids = settings.get("stop_token_ids", ())
        for count in range(1, limit + 1):
            known, text = tokens[:count].tolist(), texts[count]
            token = known[-1]
            if token in own or token in stop_ids:
                reason = token if token in stop_ids else None
                return Answer(known, logprobs[:count], texts[count - 1], "stop", reason)
            for stop in settings.get("stop", ()):
                if stop in text:
                    return Answer(known, logprobs[:count], text[: text.index(stop)], "stop", stop)
        return Answer(tokens[:limit].tolist(), logprobs[:limit], texts[limit], "length", None)


@dataclasses.dataclass
class _Asked:
    """A request of a trace."""

    kind: int
    n: int
    limit: int
    number: int
    version: int | None  # of the parameters; `None` once they changed while it ran
    logprobs: int | None
    aborted: bool = False
    seen: list[int] = dataclasses.field(default_factory=lambda: [0] * SAMPLES)


class Player:
    """Plays traces on one engine, one after the other, and checks all that comes out.

    Args:
      engine: nobody else's.
      pool: what to ask.

    Attributes:
      counts: what happened so far.
    """

    def __init__(self, engine: dsjax.Engine, pool: Pool):
        self.engine, self.pool = engine, pool
        self.counts: collections.Counter[str] = collections.Counter()
        self._version = 0
        self._preempted = self._count_preemptions()
        self._open: dict[str, _Asked] = {}
        self._held: set[int] = set()
        self._was_held = False  # in this trace, so that requests may have been refused
        self._unseeded: list[tuple[_Asked, Any]] = []

    def play(self, events: list[tuple]) -> None:
        """Play a trace to its end.

        Args:
          events: names of methods (`add`, `step`, `abort`, `hold`, `look`, `retake`, `update`) and their arguments.
        """
        for name, *arguments in events:
            getattr(self, name)(*arguments)
        self.finish()
        self.counts["traces"] += 1
        self._was_held = False

    def finish(self) -> None:
        """Let everything end, and check that nothing is left."""
        self.drop()
        rounds = 0
        while self.engine.has_unfinished_requests():
            self.step(1)
            rounds += 1
            # Each is at most read, put back and read again for every token of all that come before it.
            assert rounds < 20_000, f"hangs: {self.engine.stats()}"
        assert not self._open, self._open
        check_empty(self.engine)

    def add(
        self, kind: int, n: int = 1, limit: int | None = NEW, priority: int = 0, logprobs: int | None = None
    ) -> None:
        """A request comes."""
        n = min(n, self.engine.sizes.rows)
        chosen = self.pool.kinds[kind]
        room = CONTEXT - len(chosen.tokens)
        if limit is None and room > NEW:
            limit = NEW
        least = chosen.settings.get("min_tokens", 0)
        limit = None if limit is None else max(limit, least)
        params = dsjax.SamplingParams(n=n, max_tokens=limit, logprobs=logprobs, **chosen.settings)
        try:
            name = self.engine.add_request(list(chosen.tokens), params, priority=priority)
        except RequestError:
            assert self._held, "refused, and all fits"
            self.counts["refused"] += 1
            return
        most = room if limit is None else min(limit, room)
        self._open[name] = _Asked(kind, n, most, int(name.split("-")[1]), self._version, logprobs)
        self.counts["requests"] += 1

    def step(self, count: int, partial: bool = False) -> None:
        """The engine goes on."""
        for _ in range(count):
            for output in self.engine.step(partial=partial):
                asked = self._open[output.request_id]
                self._check(asked, output)
                if output.finished:
                    del self._open[output.request_id]

    def abort(self, which: int) -> None:
        """One of the requests is taken back."""
        if self._open:
            name = list(self._open)[which % len(self._open)]
            self._open[name].aborted = True
            self.engine.abort(name)
            self.counts["aborts"] += 1

    def hold(self, uid: int, kind: int, most: int) -> None:
        """Some tokens of a sequence that the caller drives are computed, if there is room for them."""
        tokens = self.pool.kinds[kind].tokens[: min(most, self.engine.sizes.token_budget)]
        if self.engine.can_schedule([uid], [len(tokens)]) == SchedulingResult.Success:
            self.engine.put([uid], [tokens])
            self._held.add(uid)
            self._was_held = True
            self.counts["holds"] += 1

    def drop(self) -> None:
        """Sequences that the caller drives are forgotten."""
        for uid in self._held:
            self.engine.flush(uid)
        self._held.clear()

    def look(self) -> None:
        """All calls are read, and the device's state is looked at."""
        check_pages(self.engine)

    def retake(self) -> None:
        """The pages are given back and taken again."""
        self.counts["preemptions"] += self._count_preemptions() - self._preempted
        self._preempted = 0
        self.drop()
        self.engine.release()
        self.engine.retake()
        self.counts["retakes"] += 1

    def _count_preemptions(self) -> int:
        return int(self.engine._core.require_state().counters.preemptions)

    def update(self) -> None:
        """Other values of the parameters."""
        self._version = 1 - self._version
        self.pool.answers(self._version)
        self.engine.update(model(self.pool._window, self._version))
        for asked in self._open.values():
            asked.version = None
        self.counts["updates"] += 1

    def _check(self, asked: _Asked, output: Any) -> None:
        kind = self.pool.kinds[asked.kind]
        assert output.prompt_token_ids == list(kind.tokens)
        assert [sample.index for sample in output.outputs] == list(range(asked.n))
        if output.finished:
            self.counts["answers"] += asked.n
            self.counts["tokens"] += sum(len(sample.token_ids) for sample in output.outputs)
        if asked.version is None:
            return
        if not kind.seeded and kind.settings["temperature"] > 0:
            if output.finished:
                self._unseeded.append((asked, output))
            return
        self._compare(asked, output, *self.pool.answers(asked.version)[asked.kind])

    def reset(self) -> None:
        """Take everything back, after a trace that failed, so that the next one begins with nothing."""
        for name in list(self.engine._requests):
            self.engine.abort(name)
        for _ in range(100):
            self.engine.step()
        self._open.clear()
        self._unseeded.clear()
        self.drop()

    def close(self) -> None:
        """Check what is checked together, and leave the engine as it was.

        That is requests whose keys the engine chose: they are made of its seed and their number.
        """
        if self._version:
            self.update()
        self.counts["preemptions"] += self._count_preemptions() - self._preempted
        engines = jax.random.key(0)
        for version in (0, 1):
            chosen = [(asked, output) for asked, output in self._unseeded if asked.version == version]
            keys = [jax.random.fold_in(engines, asked.number) for asked, _ in chosen]
            kinds = [self.pool.kinds[asked.kind] for asked, _ in chosen]
            for (asked, output), answers in zip(chosen, self.pool.generate(version, kinds, keys), strict=True):
                self._compare(asked, output, *answers)
            self.counts["unseeded"] += len(chosen)
        self._unseeded.clear()

    def _compare(self, asked: _Asked, output: Any, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        kind = self.pool.kinds[asked.kind]
        for sample in output.outputs:
            if isinstance(sample.error, RequestError) and self._was_held:
                self.counts["refused"] += 1
                continue
            answer = self.pool.answer(kind, tokens[sample.index], logprobs[sample.index], asked.limit)
            about = (asked, kind, sample, answer)
            count = len(sample.token_ids)
            assert sample.token_ids == answer.tokens[:count], about
            np.testing.assert_allclose(sample.token_logprobs, answer.logprobs[:count], atol=TOLERANCE)
            assert count >= asked.seen[sample.index], about
            asked.seen[sample.index] = count
            if sample.finish_reason == "abort":
                assert asked.aborted, about
            elif sample.finish_reason is not None:
                assert count == len(answer.tokens), about
                assert (sample.finish_reason, sample.stop_reason) == (answer.finish_reason, answer.stop_reason), about
                assert sample.text == answer.text, about
            if asked.logprobs is not None:
                assert sample.logprobs is not None and len(sample.logprobs) == count, about
                for token, logprob, entry in zip(sample.token_ids, sample.token_logprobs, sample.logprobs, strict=True):
                    assert abs(entry[token].logprob - logprob) < TOLERANCE, about


def check_pages(engine: dsjax.Engine) -> None:
    """The invariants of the device's state."""
    core = engine._core
    with core.lock:
        core.drain()
        state = core.require_state()
    table, counts = np.asarray(state.table.table), np.asarray(state.table.ref_counts)
    sequence, context = np.asarray(state.slots.sequence), np.asarray(state.slots.context)
    held = np.bincount(table[table < len(counts)], minlength=len(counts))
    np.testing.assert_array_equal(held, counts)
    running = sequence[sequence >= 0]
    assert len(set(running.tolist())) == len(running), "a sequence runs twice"
    assert (np.asarray(state.outputs.finish)[running] == Finish.RUNNING).all(), "what has ended runs"
    free = sequence == FREE
    assert not context[free].any() and (table[free] == len(counts)).all(), "a free slot holds something"
    assert not np.asarray(state.table.num_pages)[free].any()
    room = np.asarray(state.table.num_pages) * engine.sizes.page_size
    assert (context <= room).all(), "keys are written where there is no page"


def check_empty(engine: dsjax.Engine) -> None:
    """Nothing is left of any request: no page, slot, row or entry of a list, on the device or on the host."""
    check_pages(engine)
    core = engine._core
    assert core.state is not None
    assert engine.free_blocks == engine.sizes.pages
    assert (np.asarray(core.state.slots.sequence) == FREE).all()
    assert (np.asarray(core.state.outputs.finish) != Finish.RUNNING).all()
    rows = core.rows
    assert sorted(rows._free) == list(range(engine.sizes.rows)), "rows are lost"
    assert rows.sequences == [None] * engine.sizes.rows and not rows.active.any() and np.isinf(rows.rank).all()
    assert not (core.num_waiting or core.num_live or core._heap or core._entering or core._inbox or core._calls)
    assert not any(core._needs.values()), core._needs
    assert not engine._requests


def random_events(rng: np.random.Generator, kinds: int, *, most: int = 40, holds: bool = False) -> list[tuple]:
    """A trace of up to so many events: bursts and lulls, seldom something drastic; with sequences held, or without."""
    events: list[tuple] = []
    rate = rng.uniform(0.1, 0.8)  # of arrivals
    aborts = rng.choice([0.0, 0.05, 0.3])
    few = rng.integers(1, kinds + 1)  # the fewer kinds, the more they share
    longest = rng.choice([3, 8, 8, NEW])
    for _ in range(rng.integers(1, most)):
        draw = rng.random()
        if draw < rate:
            limit = None if rng.random() < 0.1 else int(rng.integers(1, longest + 1))
            n = int(rng.choice([1, 1, 1, 2, 3, 4]))
            ranked = int(rng.integers(0, 4)) if rng.random() < 0.1 else None
            events.append(("add", int(rng.integers(few)), n, limit, int(rng.integers(-2, 3)), ranked))
        elif draw < rate + aborts * (1 - rate):
            events.append(("abort", int(rng.integers(100))))
        elif holds and rng.random() < 0.2:
            hold = ("hold", int(rng.integers(3)), int(rng.integers(kinds)), int(rng.choice([1, 4, LONGEST])))
            events.append(hold if rng.random() < 0.7 else ("drop",))
        elif rng.random() < 0.05:
            events.append((str(rng.choice(["look", "look", "retake", "update"])),))
            events += [("abort", int(rng.integers(100)))] * int(rng.integers(0, 3))
        else:
            events.append(("step", int(rng.integers(1, 9)), bool(rng.random() < 0.2)))
    return events
