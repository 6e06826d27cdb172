"""Streams: what is read piece by piece is what a batch gives, whoever reads, however slowly, and however they leave."""

import asyncio
import codecs
import contextlib
import gc
import itertools
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from itertools import pairwise

import jax.numpy as jnp
import pytest

import dsjax
from dsjax import SamplingParams, testing
from dsjax.engine import streams
from dsjax.errors import EngineError, RequestError
from dsjax.tokenizer import Tokenizer

SIZES = dict(slots=4, token_budget=32, page_size=8, max_context=128, pages=40)
TEXT = (
    "👩‍👩‍👧‍👦 family, 🇩🇰 flag, 👍🏽, 🏴󠁧󠁢󠁥󠁮󠁧󠁿, ✈️; e\u0301 a\u0308\u0304, ก็ नमस्ते, 日本語 한국어 עִבְרִית, "
    "plain text\n\n\u200bZ\u0338\u0321a\u0327l\u0301go 🦊🦊🦊 "
)


class Pieces(Tokenizer):
    """A tokenizer whose token `i` stands for the `i`-th of some bytes."""

    def __init__(self, pieces):
        like = testing.tiny_tokenizer()
        super().__init__(like.backend)
        self.pieces, self.special_ids = pieces, frozenset()

    def token_bytes(self, token):
        return self.pieces[token] if token < len(self.pieces) else b""


@pytest.fixture(scope="module")
def counting():
    """An engine whose model follows token `i` by `i + 1`, with tokens that spell `TEXT` cut at any byte."""
    params = testing.tiny_params()
    for layer in params["layers"].values():
        layer["attention"]["out"]["weight"] *= 0
        layer["mlp"]["down"]["weight"] *= 0
    embedding = params["embed"]["weight"]
    embedding /= jnp.linalg.norm(embedding, axis=1, keepdims=True)
    params["embed"]["weight"], params["head"]["weight"] = embedding, jnp.roll(embedding, 1, axis=0) * 4
    draw = random.Random(0)
    data = TEXT.encode() * 2
    cuts = sorted({0, len(data), *draw.sample(range(len(data)), min(len(data) - 2, 300))})
    pieces = [data[a:b] for a, b in pairwise(cuts)][:320]
    return dsjax.Engine(params, Pieces(pieces), **SIZES)


@pytest.fixture(scope="module")
def noisy():
    """An engine of random parameters, whose every other token is a piece of a character."""
    return dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES)


def text_from(engine, start, count, final=True):
    """What follows token `start`, by Python's own decoder."""
    data = b"".join(engine.tokenizer.pieces[start + 1 : start + 1 + count])
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)


def asking(count, **more):
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **more)


def settle(engine):
    """Wait for the engine's thread to end, then check that nothing is left."""
    end = time.monotonic() + 5
    while engine._driver._thread is not None:
        assert time.monotonic() < end, "the thread does not end"
        time.sleep(0.002)
    assert not engine.has_unfinished_requests()
    assert engine.free_blocks == engine.sizes.pages
    assert engine.stats()["pages_used"] == engine.stats()["live_requests"] == engine.stats()["waiting"] == 0


@pytest.fixture
def gate(counting, monkeypatch):
    """Calls of the device wait until they are let through."""
    permits = threading.Semaphore(0)
    call = counting._core.programs.call

    def gated(*args, **kwargs):
        permits.acquire()
        return call(*args, **kwargs)

    monkeypatch.setattr(counting._core.programs, "call", gated)
    yield permits
    permits.release(10_000)
    settle(counting)


STARTS = [(0, 120), (7, 90), (40, 61), (111, 100), (150, 33)]


def test_joined_pieces_are_the_batch_text(counting):
    expected = [text_from(counting, *each) for each in STARTS]
    batch = counting.generate([[start] for start, _ in STARTS], [asking(count) for _, count in STARTS])
    assert [output.outputs[0].text for output in batch] == expected
    assert [output.outputs[0].token_ids for output in batch] == [[*range(s + 1, s + 1 + c)] for s, c in STARTS]
    readers = [counting.stream([start], asking(count)) for start, count in STARTS]
    pieces = [list(reader) for reader in readers]
    assert ["".join(each) for each in pieces] == expected
    assert all(len(each) > 20 and all(each) for each in pieces)  # as it comes, and no empty ones
    settle(counting)

    async def read(start, count):
        return "".join([piece async for piece in counting.astream([start], asking(count))])

    async def read_all():
        return await asyncio.gather(*(read(*each) for each in STARTS))

    assert asyncio.run(read_all()) == expected
    settle(counting)


def test_pieces_never_split_a_character(counting):
    """But for characters that were begun before the prompt's end, or are not whole at the limit."""
    whole = text_from(counting, 0, 119)
    assert "\ufffd" not in whole.strip("\ufffd")
    for piece in counting.stream([0], asking(119)):
        assert "\ufffd" not in piece.strip("\ufffd") and piece in whole


def test_stop_texts_across_token_borders(counting):
    """Against a search of the whole text."""
    draw = random.Random(1)
    asked = []
    for _ in range(40):
        start, count = draw.choice(STARTS)
        whole = text_from(counting, start, count)
        places = [draw.randrange(len(whole)) for _ in range(draw.randint(1, 3))]
        stops = tuple(dict.fromkeys(whole[place : place + draw.randint(1, 12)] for place in places))
        asked.append((start, count, draw.choice([stops, (*stops, "not there")]), draw.random() < 0.5))
    params = [asking(count, stop=stop, include_stop_str_in_output=keep) for _, count, stop, keep in asked]
    outputs = counting.generate([[start] for start, *_ in asked], params)
    readers = [counting.stream([start], each) for (start, *_), each in zip(asked[:12], params, strict=False)]
    for (start, count, stops, keep), output in zip(asked, outputs, strict=True):
        # The first token that completes a stop text ends it; of the texts complete by then the first to start counts.
        for used in range(1, count + 1):
            text = text_from(counting, start, used, final=used == count)
            hits = [(text.find(stop), i) for i, stop in enumerate(stops) if stop in text]
            if hits:
                break
        place, index = min(hits)
        result = output.outputs[0]
        assert result.finish_reason == "stop" and result.stop_reason == stops[index]
        assert result.text == text[: place + (len(stops[index]) if keep else 0)]
        assert len(result.token_ids) == len(result.token_logprobs) == used
    assert ["".join(reader) for reader in readers] == [output.outputs[0].text for output in outputs[:12]]
    settle(counting)


def test_random_tokens(noisy):
    """Sampled tokens are mostly not UTF-8 at all."""
    params = [SamplingParams(max_tokens=60, seed=seed, stop=("�", " the")[: seed % 3]) for seed in range(9)]
    batch = noisy.generate(["once upon a time 🦊"] * 9, params)
    streamed = ["".join(reader) for reader in [noisy.stream("once upon a time 🦊", each) for each in params]]
    assert streamed == [output.outputs[0].text for output in batch]
    assert {output.outputs[0].finish_reason for output in batch} == {"stop", "length"}
    settle(noisy)


def test_what_a_stream_refuses_at_once(counting):
    with pytest.raises(RequestError, match="n=2"):
        counting.stream([1], SamplingParams(n=2))
    with pytest.raises(RequestError, match="320"):
        counting.stream([320])
    without = dsjax.Engine(counting.params, **SIZES)
    with pytest.raises(RequestError, match="no tokenizer"):
        without.stream([1])
    with pytest.raises(RuntimeError, match="event loop"):
        counting.astream([1])
    assert not counting.has_unfinished_requests()


def test_threads_at_once_and_a_batch_in_the_main_one(counting):
    found = {}

    def read(start, count):
        found[start, count] = "".join(counting.stream([start], asking(count)))

    threads = [threading.Thread(target=read, args=(start, 40)) for start in range(0, 160, 20)]
    for thread in threads:
        thread.start()
    for start in range(5, 100, 30):
        (output,) = counting.generate([[start]], asking(25))
        assert output.outputs[0].text == text_from(counting, start, 25)
    for thread in threads:
        thread.join(60)
    assert found == {(start, 40): text_from(counting, start, 40) for start in range(0, 160, 20)}
    settle(counting)


def test_a_slow_reader_keeps_nobody(counting):
    slow = counting.stream([0], asking(120))
    others = [counting.stream([start], asking(50)) for start in range(10)]
    first = next(slow)
    assert ["".join(other) for other in others] == [text_from(counting, start, 50) for start in range(10)]
    settle(counting)  # it has been answered though nobody reads
    assert first + "".join(slow) == text_from(counting, 0, 120)


def _dropped(engine):
    reader = engine.stream([0], asking(120))
    yield next(reader)
    del reader


def _closed(engine):
    reader = engine.stream([0], asking(120))
    yield next(reader)
    reader.close()
    assert list(reader) == []


def _raised(engine):
    with contextlib.suppress(ZeroDivisionError):
        for piece in engine.stream([0], asking(120)):
            yield piece
            raise ZeroDivisionError


def _never_begun(engine):
    reader = engine.stream([0], asking(120))
    yield
    del reader


@pytest.mark.parametrize("leave", [_dropped, _closed, _raised, _never_begun], ids=lambda leave: leave.__name__)
def test_a_reader_that_leaves(counting, gate, leave):
    before = counting.stats()
    gate.release(6)
    stays = counting.stream([20], asking(100))
    for _ in leave(counting):
        pass
    gate.release(10_000)
    assert "".join(stays) == text_from(counting, 20, 100)
    settle(counting)
    after = counting.stats()
    assert after["aborted"] == before["aborted"] + 1 and after["finished"] == before["finished"] + 1
    assert after["generated_tokens"] < before["generated_tokens"] + 200


async def _awhile(engine):
    async for _ in engine.astream([0], asking(120)):
        break


async def _cancelled(engine):
    reader = engine.astream([0], asking(120))

    async def read():
        async for _ in reader:
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return reader  # though somebody still has it


async def _async_closed(engine):
    async with contextlib.aclosing(engine.astream([0], asking(120))) as reader:
        await anext(reader)
    assert [piece async for piece in reader] == []


async def _async_never_begun(engine):
    engine.astream([0], asking(120))


async def _timed_out(engine):
    reader = engine.astream([0], asking(120))
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.05):
            async for _ in reader:
                pass


ASYNC_LEAVES = [_awhile, _cancelled, _async_closed, _async_never_begun, _timed_out]


@pytest.mark.parametrize("leave", ASYNC_LEAVES, ids=lambda leave: leave.__name__)
def test_a_task_that_leaves(counting, gate, leave):
    before = counting.stats()
    gate.release(6)

    async def main():
        kept = await leave(counting)
        gate.release(10_000)
        return "".join([piece async for piece in counting.astream([20], asking(127))]), kept

    text, kept = asyncio.run(main())
    assert text == text_from(counting, 20, 127)
    settle(counting)
    after = counting.stats()
    del kept
    assert after["aborted"] == before["aborted"] + 1 and after["finished"] == before["finished"] + 1


def test_a_closed_event_loop(counting, gate):
    """Its streams end, though they still are somewhere."""
    before = counting.stats()["aborted"]
    loop = asyncio.new_event_loop()

    async def begin():
        return counting.astream([0], asking(120))

    gate.release(3)
    reader = loop.run_until_complete(begin())
    loop.close()
    gate.release(10_000)
    settle(counting)
    assert counting.stats()["aborted"] == before + 1
    del reader


def test_an_unread_stream_of_a_dropped_engine_goes_on():
    engine = dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES)
    (expected,) = engine.generate("abc", asking(100))
    reader = engine.stream("abc", asking(100))
    engine_is = weakref.ref(engine)
    core_is = weakref.ref(engine._core)
    del engine
    gc.collect()
    assert engine_is() is None
    assert "".join(reader) == expected.outputs[0].text
    del reader
    _gone(core_is)


def test_nothing_keeps_an_engine_alive():
    """Nor its parameters and pages."""
    engine = dsjax.Engine(testing.tiny_params(), testing.tiny_tokenizer(), **SIZES)
    engine.generate(["abc", "def"], SamplingParams(n=2, max_tokens=5, logprobs=2, stop="x"))
    assert "".join(engine.stream("abc", asking(10))) and next(engine.stream("abc", asking(100)))

    async def read():
        return "".join([piece async for piece in engine.astream("abc", asking(10))])

    assert asyncio.run(read())
    settle(engine)
    kept = [weakref.ref(thing) for thing in (engine, engine._core, engine._core.state.pages, engine.params)]
    del engine
    for one in kept:
        _gone(one)


def _gone(ref):
    end = time.monotonic() + 30
    while ref() is not None and time.monotonic() < end:  # its thread may still be in its last line
        gc.collect()
        time.sleep(0.002)
    assert ref() is None


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_listeners_hear_of_a_thread_that_died(counting, monkeypatch):
    advance, count = counting._core.advance, [0]

    def breaks():
        count[0] += 1
        if count[0] == 9:
            raise MemoryError("no more")
        advance()

    monkeypatch.setattr(counting._core, "advance", breaks)
    readers = [counting.stream([start], asking(100)) for start in range(6)]  # some run, some wait
    for start, reader in enumerate(readers):
        text = ""
        with pytest.raises(EngineError, match="MemoryError: no more"):
            for piece in reader:
                text += piece
        assert text_from(counting, start, 100).startswith(text.rstrip("\ufffd"))
        assert list(reader) == []

    async def read():
        return [piece async for piece in counting.astream([3], asking(100))]

    count[0] = 0
    with pytest.raises(EngineError, match="MemoryError: no more"):
        asyncio.run(read())
    assert "".join(counting.stream([7], asking(5))) == text_from(counting, 7, 5)
    settle(counting)


def test_a_stream_outlives_the_release_of_the_pages(counting, monkeypatch):
    core, count = counting._core, itertools.count(1)
    advance = core.advance

    def then_releases():
        advance()
        if next(count) == 9:
            counting.release()

    monkeypatch.setattr(core, "advance", then_releases)
    readers = [counting.stream([start], asking(120)) for start in (0, 50)]
    counting._driver._thread.join(20)
    assert core.state is None
    with pytest.raises(EngineError, match="retake"):
        counting.stream([0])
    counting.retake()
    assert ["".join(reader) for reader in readers] == [text_from(counting, start, 120) for start in (0, 50)]
    settle(counting)


def test_python_ends_while_an_engine_runs(counting, gate):
    gate.release(4)
    reader = counting.stream([0], asking(120))
    next(reader)
    timer = threading.Timer(0.05, gate.release, (2,))
    timer.start()
    streams._stop_all()  # comes back though the request is not answered
    assert counting._driver._thread is None and counting.has_unfinished_requests()
    timer.join()
    counting._driver._stopped = False
    gate.release(10_000)
    assert "".join(counting.stream([9], asking(9))) == text_from(counting, 9, 9)


def test_threads_end_before_python_does():
    """One that is killed inside XLA aborts the process."""
    code = """
        import atexit, threading, time
        atexit.register(lambda: print([t.name for t in threading.enumerate() if "dsjax" in t.name]))
        from dsjax.engine.streams import Driver

        class Core:
            lock, state = threading.RLock(), 1
            def has_work(self): return True
            def advance(self): time.sleep(0.01)

        driver = Driver(Core())
        driver._start()
        print(driver._thread.name)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["dsjax-engine", "[]"]), done.stderr
