"""Whatever comes, goes and is taken back: each request gets what it gets alone, and nothing is left behind."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import dsjax
from bench import soak, traces
from dsjax.engine.engine import OVERTAKEN

KINDS = 48
_compiled = soak.count_compilations()


@pytest.fixture(scope="module")
def pool():
    """Requests, and what they give alone under both versions of the parameters."""
    pool = traces.Pool(seed=7, size=KINDS)
    for version in (0, 1):
        pool.answers(version)
    return pool


@pytest.fixture(scope="module")
def players(pool):
    """Engines with pools for little more than one long request, all of whose programs are compiled."""
    players = {name: traces.Player(traces.make_engine(name), pool) for name in ("tiny", "ahead")}
    for player in players.values():
        player.play(soak.rare(pool))
    yield players
    for player in players.values():
        player.close()


def events():
    """A trace; what shrinks is fewer and plainer events."""
    add = st.tuples(
        st.just("add"),
        st.integers(0, KINDS - 1),
        st.integers(1, traces.SAMPLES),
        st.none() | st.integers(1, traces.NEW),
        st.integers(-2, 2),
        st.none() | st.just(2),
    )
    step = st.tuples(st.just("step"), st.integers(1, 6), st.booleans())
    abort = st.tuples(st.just("abort"), st.integers(0, 9))
    rare = st.sampled_from([("look",), ("retake",), ("update",)])
    return st.lists(st.one_of(add, add, step, step, abort, rare), max_size=14)


FILL = [("add", 0, 4, 24, 0, None)] * 2  # all rows of the smaller engine


@hypothesis.example("tiny", [*FILL, ("step", 12, False), ("add", 1, 4, 24, 0, None), ("look",), ("abort", 0)])
@hypothesis.settings(max_examples=60)
@hypothesis.given(name=st.sampled_from(["tiny", "ahead"]), events=events())
def test_any_trace(players, name, events):
    before = len(_compiled)
    try:
        players[name].play(events)
    except BaseException:
        players[name].reset()
        raise
    assert _compiled[before:] == [], "a program was compiled for a request"


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_seeded_traces(players, name):
    player, rng, before = players[name], np.random.default_rng(5), len(_compiled)
    for _ in range(35):
        player.play(traces.random_events(rng, KINDS, most=30))
    assert _compiled[before:] == []
    player.close()
    for what in ("aborts", "retakes", "updates", "unseeded", "preemptions"):
        assert player.counts[what], f"{what} did not happen"


def test_low_priority_is_served_in_time(players):
    """Among an endless stream of more important ones, which it lets pass, but no more of them than it says."""
    engine, after = players["tiny"].engine, dsjax.SamplingParams(max_tokens=1, temperature=0)
    engine.add_request([7] * 40, dsjax.SamplingParams(max_tokens=20, temperature=0), request_id="low", priority=1)
    passed = running = 0
    low_began = low_ended = False
    while not low_ended:
        while running < 12:
            engine.add_request([11 + passed % 200], after)
            running += 1
        for output in engine.step(partial=True):
            if output.request_id == "low":
                low_began |= bool(output.outputs[0].token_ids)
                low_ended = output.finished
            elif output.finished:
                running -= 1
                passed += not low_began
        assert passed <= OVERTAKEN + 12
    assert passed > OVERTAKEN - 12, "priority means nothing"
    while engine.has_unfinished_requests():
        engine.step()
    traces.check_empty(engine)
