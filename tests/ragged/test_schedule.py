"""The scheduler against its invariants, over random traces with a stand-in for the model."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from fake_model import (
    LONGEST,
    NEW,
    PROMPTS,
    Sizes,
    fake_step,
    finish_trace,
    make_queue,
    make_state,
    violations,
)
from hypothesis import strategies as st

from dsjax.ragged.groups import PageGroups, pages_for
from dsjax.ragged.schedule import admit
from dsjax.ragged.state import FREE, Slots

# Few shapes, few programs: from a pool that just holds the longest sequence to one where nothing is ever short.
SIZES = [
    Sizes(slots=1, pages=9, page_size=4, token_budget=1),
    Sizes(slots=3, pages=12, page_size=4, token_budget=4, samples=3),
    Sizes(slots=3, pages=30, page_size=2, token_budget=16, samples=4, steps_per_sync=3),
    Sizes(slots=4, pages=15, page_size=4, token_budget=LONGEST + NEW, samples=2, split_fuse=False),
]


@st.composite
def traces(draw):
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=PROMPTS, max_size=PROMPTS))
    limits = draw(st.lists(st.integers(1, NEW), min_size=PROMPTS, max_size=PROMPTS))
    sizes = draw(st.sampled_from(SIZES))
    spare = sizes.pages - pages_for(LONGEST + NEW - 1, sizes.page_size)
    held = draw(st.integers(0, min(spare, 3))) if sizes.slots > 1 else 0
    return lengths, limits, sizes, held, draw(st.integers(0, 2**16))


@hypothesis.settings(max_examples=300, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(traces())
def test_random_traces(trace):
    """Also beside a slot that somebody else holds, and with prompts that are read whole."""
    lengths, limits, sizes, held, seed = trace
    queue = make_queue(lengths, limits, sizes.samples, seed)
    finish_trace(queue, make_state(queue, sizes, held), sizes)


def test_pool_for_just_one():
    """With pages for one sequence at a time, all finish."""
    queue = make_queue([LONGEST] * PROMPTS, [NEW] * PROMPTS, 3, seed=1)
    sizes = SIZES[1]._replace(pages=pages_for(LONGEST + NEW - 1, 4))
    finish_trace(queue, make_state(queue, sizes), sizes)


def test_newest_is_preempted_and_comes_back():
    queue = make_queue([20] * PROMPTS, [NEW] * PROMPTS, 2, seed=3)
    queue = dataclasses.replace(queue, stop_ids=queue.stop_ids - 99)  # nobody stops early
    state = finish_trace(queue, make_state(queue, SIZES[-1]), SIZES[-1])
    assert state.counters.preemptions > 0


def test_samples_share_pages():
    """Samples of one prompt hold its full pages once, and only the page that each writes to is its own."""
    queue = make_queue([22] * PROMPTS, [NEW] * PROMPTS, 4, seed=2)
    queue = dataclasses.replace(queue, order=jnp.arange(PROMPTS * 4, dtype=jnp.int32))
    admit_now = jax.jit(admit)
    state = admit_now(queue, make_state(queue, Sizes(slots=4, pages=40, page_size=4, token_budget=128)))
    assert np.asarray(state.slots.sequence).tolist() == [0, 4, 8, 12], "one sample of each prompt reads it"
    state, _ = jax.jit(functools.partial(fake_step, num_tokens=128))(queue, state)
    others = jnp.array([False, True, True, True])
    state = dataclasses.replace(
        state,
        table=state.table.release(others),
        slots=Slots(jnp.where(others, FREE, state.slots.sequence), jnp.where(others, 0, state.slots.context)),
    )
    state = admit_now(queue, state)
    assert not jax.jit(functools.partial(violations, groups=PageGroups()))(queue, state).any()
    table = np.asarray(state.table.table)
    assert np.asarray(state.slots.sequence).tolist() == [0, 1, 2, 3]
    assert np.asarray(state.slots.context).tolist() == [22, 21, 21, 21]
    assert (table[1:, :5] == table[0, :5]).all(), "five pages are full with 22 - 1 tokens, and shared"
    assert len({*table[:, 5].tolist()}) == 4, "the sixth is everyone's own"
    assert (np.asarray(state.table.ref_counts)[table[0, :5]] == 4).all()


def test_order_is_kept():
    """The lowest order is served first, wherever it stands in the queue."""
    queue = make_queue([8] * PROMPTS, [NEW] * PROMPTS, 1, seed=4)
    queue = dataclasses.replace(queue, order=jnp.array([5, 3, 0, 4, 1, 2], jnp.int32))
    state = jax.jit(admit)(queue, make_state(queue, Sizes(slots=3, pages=40, page_size=4, token_budget=16)))
    assert np.asarray(state.slots.sequence).tolist() == [2, 4, 5]
