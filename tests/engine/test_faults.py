"""What goes wrong reaches whom it concerns; all others answer as if alone, and every page comes back."""

import os
import signal
import threading
import warnings
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax import EngineError, RequestError, SamplingParams, memory
from dsjax.engine.compiled import Programs
from dsjax.ragged.state import FREE
from dsjax.testing import tiny_params, tiny_tokenizer

SIZES: dict[str, Any] = dict(slots=4, token_budget=16, page_size=4, pages=20, max_context=47, steps_per_sync=2)
COUNT = 11  # requests; the device knows of 8 at once


class Fault(RuntimeError):
    """Stands for an error of the device."""


class Unreadable:
    """Outputs of a call that failed while it ran."""

    def __array__(self, *_, **__):
        raise Fault("planted in the outputs")


class Faulty:
    """Programs that fail when they are told to.

    Args:
      programs: what to run.
      when: of a program's name and how often it ran: `None`; or `"before"` to fail with everything as it was,
        `"after"` with its arguments given away, `"outputs"` when what a call gave is read.
    """

    def __init__(self, programs, when):
        self._programs, self._when, self.ran = programs, when, Counter()

    def __getattr__(self, name):
        return getattr(self._programs, name)

    def _guarded(self, name, function):
        kind = self._when(name, self.ran[name])
        self.ran[name] += 1
        if kind == "before":
            raise Fault(f"planted before {name}")
        result = function()
        if kind == "after":
            raise Fault(f"planted after {name}")
        return (result[0], Unreadable(), result[2]) if kind == "outputs" else result

    def run(self, name, *arguments):
        return self._guarded(name, lambda: self._programs.run(name, *arguments))

    def call(self, *arguments, **options):
        return self._guarded("call", lambda: self._programs.call(*arguments, **options))


def at(program, kind, *numbers):
    """A fault of one kind when a program runs for these times."""
    return lambda name, number: kind if name == program and number in numbers else None


@pytest.fixture(scope="module")
def params():
    return tiny_params()


@pytest.fixture(scope="module")
def module_engine(params):
    return dsjax.Engine(params, tiny_tokenizer(), **SIZES)


@pytest.fixture
def engine(module_engine):
    """The module's engine; afterwards nothing runs, and nothing is held."""
    engine = module_engine
    core, programs = engine._core, engine._core.programs
    yield engine
    core.programs = programs
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.free_blocks == SIZES["pages"]
    assert not np.asarray(core.state.table.ref_counts).any()
    assert (np.asarray(core.state.slots.sequence) == FREE).all()
    core.rows.free(core._read)
    assert core.rows.num_free == core.sizes.rows and core.num_live == core.num_waiting == 0
    assert not +core._needs and not core.held.by_uid and not core.held.lost


@pytest.fixture
def plant(engine):
    """Make the engine's programs fail."""

    def plant(when):
        engine._core.programs = Faulty(engine._core.programs, when)
        return engine._core.programs

    return plant


@pytest.fixture(scope="module")
def requests():
    """Prompts, some of which begin alike, and their settings."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 320, rng.integers(1, 24)).tolist() for _ in range(COUNT)]
    prompts[3] = prompts[2][:8] + prompts[3]
    settings = [
        SamplingParams(max_tokens=int(rng.integers(4, 14)), temperature=float(i % 2), seed=i, ignore_eos=True)
        for i in range(COUNT)
    ]
    return prompts, settings


@pytest.fixture(scope="module")
def alone(params, requests):
    """What `generate` gives for each: tokens and log-probabilities."""
    prompts, settings = requests
    out = dsjax.generate(
        params,
        prompts,
        max_new_tokens=16,
        limits=[each.max_tokens for each in settings],
        key=jnp.stack([jax.random.key(each.seed) for each in settings]),
        temperature=[each.temperature for each in settings],
        ignore_eos=True,
    )
    tokens, logprobs, lengths = (np.asarray(x)[:, 0] for x in (out.tokens, out.logprobs, out.lengths))
    return [(tokens[i, : lengths[i]].tolist(), logprobs[i, : lengths[i]]) for i in range(COUNT)]


def check(output, alone):
    """One answer is what it is alone."""
    tokens, logprobs = alone
    (completion,) = output.outputs
    assert completion.finish_reason == "length" and completion.error is None
    assert completion.token_ids == tokens
    np.testing.assert_allclose(completion.token_logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "program, kind, number",
    [(p, k, n) for p in ("call", "submit") for k in ("before", "after") for n in (0, 2)]
    + [("call", "outputs", n) for n in (0, 1, 9)]
    + [("call", "after", 17)],
)
def test_one_fault(engine, plant, requests, alone, program, kind, number):
    """Everything is computed again, and nobody notices."""
    faults = engine.stats()["faults"]
    faulty = plant(at(program, kind, number))
    outputs = engine.generate(*requests)
    assert faulty.ran["empty_state"] == 1
    for output, expected in zip(outputs, alone, strict=True):
        check(output, expected)
    assert engine.stats()["faults"] == faults + 1
    assert "Fault: planted" in engine.last_fault and "requests" in engine.last_fault
    # Keys of texts were made anew too: what was read after the fault is found again.
    prompt, settings = requests[0][-1] + [7] * 8, SamplingParams(max_tokens=9, temperature=0)
    first = engine.generate([prompt], settings)[0].outputs[0].token_ids
    found = int(engine._core.state.prefixes.found)
    assert engine.generate([prompt], settings)[0].outputs[0].token_ids == first
    assert int(engine._core.state.prefixes.found) - found >= 4


def test_keys_of_texts_after_a_fault(engine, plant, requests, alone):
    """A prompt that was on its way when a step failed is found in the cache later."""
    rng = np.random.default_rng(1)
    prompt, settings = rng.integers(5, 320, 21).tolist(), SamplingParams(max_tokens=3, temperature=0)
    plant(at("submit", "after", 0))
    first = engine.generate([prompt], settings)[0].outputs[0].token_ids
    found = int(engine._core.state.prefixes.found)
    assert engine.generate([prompt], settings)[0].outputs[0].token_ids == first
    assert int(engine._core.state.prefixes.found) - found == 20


@pytest.mark.parametrize("kind", ["before", "after", "outputs"])
def test_two_faults_in_a_row(engine, plant, requests, alone, kind):
    """Those that the device knew of are given up, and say why; those that waited are answered."""
    plant(at("call", kind, 4, 5) if kind != "outputs" else at("call", kind, *range(4, 7)))
    outputs = engine.generate(*requests)
    failed = [output for output in outputs if output.outputs[0].finish_reason == "error"]
    assert 0 < len(failed) <= 8
    for output, expected in zip(outputs, alone, strict=True):
        if output not in failed:
            check(output, expected)
            continue
        error = output.outputs[0].error
        assert isinstance(error, EngineError) and "failed twice" in str(error) and isinstance(error.__cause__, Fault)
        assert output.outputs[0].token_ids == expected[0][: len(output.outputs[0].token_ids)]
    assert f"failed again, and {len(failed)} requests were given up" in engine.last_fault
    assert len(failed) < COUNT
    for output, expected in zip(engine.generate(*requests), alone, strict=True):
        check(output, expected)


@pytest.mark.parametrize("seed", range(6))
def test_faults_at_random(engine, plant, requests, alone, seed):
    rng = np.random.default_rng(seed)
    kinds = ["before", "after", "outputs"]

    def when(name, number):
        if name in ("empty_state", "empty_queue", "restart") or rng.random() > 0.08:
            return None
        return str(rng.choice(kinds[:2] if name != "call" else kinds))

    plant(when)
    prompts, settings = requests
    for _ in range(200):
        try:  # also a restart may fail, when it says again what was said before
            outputs = engine.generate(prompts, settings)
        except EngineError as error:
            assert "retake" in str(error)
            engine.retake()
            continue
        for output, expected in zip(outputs, alone, strict=True):
            if output.outputs[0].error is None:
                check(output, expected)
            else:
                assert isinstance(output.outputs[0].error, EngineError)
        if engine._core.programs.ran["call"] > 150:
            break


@pytest.mark.parametrize(
    "program, message", [("empty_state", "no room for the pages"), ("restart", "could not be put back")]
)
def test_restart_fails(engine, plant, requests, alone, program, message):
    """No pages can be made after a fault: everybody is told, and `retake` goes on when there is memory."""
    waiting = engine.add_request(requests[0][0], requests[1][0])
    plant(lambda name, number: "before" if name == program or (name, number) == ("call", 3) else None)
    with pytest.raises(EngineError, match=rf"can not go on after a failed step.*{message}.*engine.retake\(\)"):
        engine.generate(*requests)
    assert "so were all requests" in engine.last_fault
    for call in (engine.step, lambda: engine.put([1], [[1]]), lambda: engine.generate([[1]])):
        with pytest.raises(EngineError, match=r"engine.retake\(\)"):
            call()
    if program == "empty_state":
        with pytest.raises(EngineError, match="no room for the pages.*fewer pages"):
            engine.retake()
    engine._core.programs = engine._core.programs._programs
    engine.retake()
    (output,) = [output for output in engine.step() if output.request_id == waiting]
    assert isinstance(output.outputs[0].error, EngineError)
    for output, expected in zip(engine.generate(*requests), alone, strict=True):
        check(output, expected)


@pytest.mark.parametrize("program", ["empty_state", "restart", "submit"])
def test_retake_fails(engine, plant, requests, alone, program):
    """Requests wait on for pages that can not be made yet."""
    name = engine.add_request(requests[0][5], requests[1][5])
    for _ in range(3):
        engine.step()
    engine.release()
    plant(at(program, "before", 0, 1))
    for _ in range(2):
        with pytest.raises(EngineError, match="planted before"):
            engine.retake()
        assert engine._core.state is None
    engine.retake()
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[0].request_id == name
    check(outputs[0], alone[5])


@pytest.mark.parametrize("kind", ["before", "after", "outputs"])
def test_fault_with_sequences_of_put(engine, plant, requests, alone, kind):
    """Their pages are lost, and nothing is computed on top of pages that are not theirs."""
    text = requests[0][4][:9]
    engine.put([1, 2], [text[:4], text[:2]])
    plant(at("call", kind, 2))
    for output, expected in zip(engine.generate(*requests), alone, strict=True):
        check(output, expected)
    assert "2 sequences of put" in engine.last_fault
    assert engine.free_blocks == SIZES["pages"]
    for call in (
        lambda: engine.put([3, 1], [[1], [2]]),
        lambda: engine.can_schedule([1], [1]),
        lambda: engine.query(1, 1, 1),
        lambda: engine.get_remaining_block_capacity(1),
    ):
        with pytest.raises(EngineError, match="pages of sequence 1: flush it"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.flush(1)
        engine.flush(2)
    logits = engine.put([1], [text])
    np.testing.assert_allclose(logits[0], dsjax.logits(engine.params, [text])[0, 8], atol=1e-4)
    engine.flush(1)


@pytest.mark.parametrize(
    "program, kind", [("put", "before"), ("put", "after"), ("put_one", "after"), ("call", "outputs")]
)
def test_fault_in_put(engine, plant, requests, alone, program, kind):
    """The caller of `put` is told; requests beside it are computed again."""
    name = engine.add_request(requests[0][5], requests[1][5])
    engine.put([1], [[1, 2, 3]])
    plant(at(program, kind, 0))
    engine.step()
    with pytest.raises(EngineError, match="planted|sequence 1"):
        engine.put([1], [[4]] if program == "put_one" else [[4, 5]])
    assert "1 sequences of put" in engine.last_fault
    engine.flush(1)
    engine.put([1], [[1, 2, 3]])
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    check(next(output for output in outputs if output.request_id == name), alone[5])
    engine.flush(1)


def test_fault_in_flush(engine, plant):
    engine.put([1, 2], [[1, 2, 3], [1]])
    plant(at("flush", "after", 0))
    with pytest.raises(EngineError, match="planted after flush.*2 sequences of put"):
        engine.flush(1)
    engine.flush(1)
    engine.flush(2)


@pytest.mark.parametrize(
    "processor, error, message",
    [
        (lambda known, logits: 1 / 0, ZeroDivisionError, "division"),
        (lambda known, logits: logits[:-1], RequestError, r"shape \[319\], not \[320\]"),
        (lambda known, logits: logits * np.nan, RequestError, "NaN"),
        (lambda known, logits: logits + np.inf, RequestError, "inf"),
        (lambda known, logits: logits - np.inf, RequestError, "-inf for every token"),
        (lambda known, logits: None, RequestError, "NaN|shape"),
        (lambda known, logits: "no", ValueError, "could not convert"),
    ],
)
def test_processor_that_fails(engine, requests, alone, processor, error, message):
    """Its request ends with the error and what was generated; the others do not notice."""
    prompts, settings = requests
    fails_at = len(prompts[6]) + 3

    def fails(known, logits):
        return logits if len(known) < fails_at else processor(known, logits)

    kept = SamplingParams(max_tokens=12, temperature=0, seed=6, ignore_eos=True, logits_processor=fails)
    outputs = engine.generate(prompts, [*settings[:6], kept, *settings[7:]])
    for i, (output, expected) in enumerate(zip(outputs, alone, strict=True)):
        if i != 6:
            check(output, expected)
    (completion,) = outputs[6].outputs
    assert completion.finish_reason == "error" and len(completion.token_ids) == 3
    assert isinstance(completion.error, error)
    with pytest.raises(error, match=message):
        raise completion.error
    assert completion.token_ids == alone[6][0][:3]
    # The row of what ended is given to the next before the device was told of the end; it is told both.
    assert engine.generate([prompts[6]], kept)[0].outputs[0].finish_reason == "error"
    every = SamplingParams(n=8, max_tokens=5, temperature=0, ignore_eos=True)
    (output,) = engine.generate([prompts[6]], every)
    assert [sample.token_ids for sample in output.outputs] == [alone[6][0][:5]] * 8


def test_processor_forbids(engine, requests):
    """Forbidding all but some tokens on the host is `allowed_token_ids`; log-probabilities stay the model's own."""
    prompts, settings = requests
    allowed = np.arange(0, 320, 7)

    def only_allowed(known, logits):
        assert logits.shape == (320,) and logits.dtype == np.float32 and isinstance(known, list)
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept
        return logits

    given = dict(max_tokens=8, ignore_eos=True, logprobs=2, top_p=0.9)
    seen = [dict(seed=each.seed, temperature=each.temperature, n=1 + i % 2) for i, each in enumerate(settings)]
    on_device = [SamplingParams(**given, **each, allowed_token_ids=allowed) for each in seen]
    on_host = [SamplingParams(**given, **each, logits_processor=only_allowed) for each in seen]
    for one, other in zip(engine.generate(prompts, on_device), engine.generate(prompts, on_host), strict=True):
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            assert mine.token_ids == theirs.token_ids and set(mine.token_ids) <= set(allowed.tolist())
            np.testing.assert_allclose(mine.token_logprobs, theirs.token_logprobs, atol=1e-4)
            assert mine.logprobs is not None and theirs.logprobs is not None
            for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert {token: entry.rank for token, entry in a.items()} == {t: entry.rank for t, entry in b.items()}


def test_processor_sees_the_text(engine, requests, alone):
    """What is known before each token, once for each; and prompts that are ranked beside it are ranked as without."""
    prompts, settings = requests
    seen = []

    def watch(known, logits):
        seen.append(known)
        return logits

    ranked = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=3)
    (before,) = engine.generate([prompts[9]], ranked)
    watched = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logits_processor=watch)
    after, mine = engine.generate([prompts[9], prompts[0]], [ranked, watched])
    whole = prompts[0] + mine.outputs[0].token_ids
    assert seen == [whole[:end] for end in range(len(prompts[0]), len(whole))]
    assert mine.outputs[0].token_ids == (alone[0][0] + mine.outputs[0].token_ids[len(alone[0][0]) :])[:8]
    assert before.prompt_logprobs is not None and after.prompt_logprobs is not None
    for a, b in zip(before.prompt_logprobs[1:], after.prompt_logprobs[1:], strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[t].logprob for t in a], [b[t].logprob for t in a], atol=1e-4)


@pytest.fixture
def press_once(plant):
    """Ctrl-C, from another thread, in the middle of a call of the device."""
    assert threading.current_thread() is threading.main_thread(), "no other hears Ctrl-C"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda program, number: plant(_pressing(program, number))
    signal.signal(signal.SIGINT, before)


def _pressing(program, number):
    def when(name, count):
        if (name, count) == (program, number):
            thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
            thread.start()
            thread.join()

    return when


def test_interrupt_in_generate(engine, press_once, requests, alone):
    """Ctrl-C ends what `generate` was asked for; requests of others go on."""
    prompts, settings = requests
    name = engine.add_request(prompts[1], settings[1])
    press_once("call", 3)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, settings)
    assert engine.stats()["live_requests"] == 1 and engine._core.num_waiting == 0
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == [name]
    check(outputs[0], alone[1])
    for output, expected in zip(engine.generate(*requests), alone, strict=True):
        check(output, expected)


def test_interrupt_in_put(engine, press_once):
    """What was begun is done, so that what is known of the sequence is right."""
    press_once("put", 0)
    with pytest.raises(KeyboardInterrupt):
        engine.put([1], [[1, 2, 3]])
    assert engine.get_remaining_block_capacity(1) == 1
    logits = engine.put([1], [[4]])
    np.testing.assert_allclose(logits[0], dsjax.logits(engine.params, [[1, 2, 3, 4]])[0, 3], atol=1e-4)
    engine.flush(1)


def test_interrupt_in_step(engine, press_once, requests, alone):
    prompts, settings = requests
    name = engine.add_request(prompts[1], settings[1])
    press_once("call", 1)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            engine.step()
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == [name]
    check(outputs[0], alone[1])


def test_interrupt_in_stream(engine, requests):
    """Ctrl-C while a piece is waited for ends the stream's request."""
    engine.generate("hello", SamplingParams(max_tokens=2))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hold = threading.Event()

    def slow(known, logits):
        if len(known) > 12:
            os.kill(os.getpid(), signal.SIGINT)
            hold.wait(5)
        return logits

    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in engine.stream("hello", SamplingParams(max_tokens=20, ignore_eos=True, logits_processor=slow)):
                pass
    finally:
        signal.signal(signal.SIGINT, before)
        hold.set()


def test_streams_that_are_dropped(engine, requests, alone):
    """Nobody reads on: the request ends, the others do not."""
    long = SamplingParams(max_tokens=30, ignore_eos=True)
    begun, unread, closed = (engine.stream("hello", long) for _ in range(3))
    next(begun)
    closed.close()
    del begun, unread
    for output, expected in zip(engine.generate(*requests), alone, strict=True):
        check(output, expected)


def test_fault_in_a_stream(engine, plant, requests):
    """A fault that passes is not seen in the text; one that stays reaches the reader."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    text = "".join(engine.stream("hello", params))
    plant(at("call", "after", 2))
    assert "".join(engine.stream("hello", params)) == text
    plant(at("call", "before", 2, 3))
    with pytest.raises(EngineError, match="failed twice"):
        list(engine.stream("hello", params))
    while engine.has_unfinished_requests():
        engine.step()


def test_release_with_running_requests(engine, requests, alone):
    """They wait, and are computed again; twice."""
    prompts, settings = requests
    names = [engine.add_request(*request) for request in zip(prompts, settings, strict=True)]
    outputs = []
    for _ in range(2):
        for _ in range(5):
            outputs += engine.step()
        engine.release()
        assert engine._core.state is None and engine._core.queue is None
        with pytest.raises(EngineError, match="retake"):
            engine.step()
        engine.retake()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    answers = {output.request_id: output for output in outputs}
    for name, expected in zip(names, alone, strict=True):
        check(answers[name], expected)


def test_no_memory_at_start(params, module_engine, monkeypatch):
    """The message says what is needed, what there is, and what to do."""
    monkeypatch.setattr(memory, "available", lambda device=None: ("a small device", 150_000))
    with pytest.raises(EngineError, match="180.9 kB weights.*temporaries.*quantize the weights"):
        dsjax.Engine(params, **(SIZES | {"pages": None}))
    with pytest.raises(EngineError, match="180.9 kB weights.*20 pages.*of 150.0 kB.*lower slots"):
        dsjax.Engine(params, tiny_tokenizer(), **SIZES)


def test_no_memory_for_the_pages(params, module_engine, monkeypatch):
    """The plan fits, and the device refuses nevertheless: others are in its memory."""
    run = Programs.run

    def refuses(self, name, *arguments):
        if name == "empty_state":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 40960 bytes.")
        return run(self, name, *arguments)

    monkeypatch.setattr(Programs, "run", refuses)
    with pytest.raises(EngineError, match="20 pages.*no room for the pages.*RESOURCE_EXHAUSTED.*memory_fraction"):
        dsjax.Engine(params, tiny_tokenizer(), **SIZES)
