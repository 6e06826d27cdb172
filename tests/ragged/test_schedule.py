"""The scheduler against its invariants, over random traces with a stand-in for the model.

The stand-in writes (token, position) into the pages where a model would write keys, and draws tokens from a hash of the
text read back from the pages. So a page that is shared wrongly, copied late or reused early shows as a wrong text.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.schedule import admit, advance, has_prompts, pages_for, plan, unfinished
from dsjax.ragged.state import Counters, Finish, Outputs, Queue, Sampling, Slots, State
from dsjax.request import Capacity

PROMPTS, LONGEST, NEW = 6, 24, 10
STOP = 3


def make_queue(lengths, limits, samples, seed):
    rng = np.random.default_rng(seed)
    count = jnp.zeros(PROMPTS)
    sequences = PROMPTS * samples
    return Queue(
        tokens=jnp.asarray(rng.integers(0, 50, PROMPTS * LONGEST), jnp.int32),
        offsets=jnp.arange(PROMPTS, dtype=jnp.int32) * LONGEST,
        lengths=jnp.asarray(lengths, jnp.int32),
        keys=jax.random.split(jax.random.key(0), PROMPTS),
        sampling=Sampling(count, count, count, count, count, None),
        stop_ids=jnp.full((PROMPTS, 1), STOP, jnp.int32),
        prompt=jnp.arange(sequences, dtype=jnp.int32) // samples,
        sample=jnp.arange(sequences, dtype=jnp.int32) % samples,
        limits=jnp.asarray(limits, jnp.int32)[jnp.arange(sequences) // samples],
        order=jnp.asarray(rng.permutation(sequences), jnp.int32),
    )


def make_state(queue, slots, pages, page_size):
    sequences = queue.prompt.shape[0]
    pool = (jnp.full((pages, 1, page_size, 2), -1.0),)
    return State(
        pages=KVPages(pool, pool),
        table=PageTable.empty(slots, pages_for(LONGEST + NEW, page_size), pages),
        slots=Slots(jnp.full(slots, -1, jnp.int32), jnp.zeros(slots, jnp.int32)),
        outputs=Outputs(
            tokens=jnp.zeros((sequences, NEW), jnp.int32),
            logprobs=jnp.zeros((sequences, NEW)),
            sampling_logprobs=None,
            lengths=jnp.zeros(sequences, jnp.int32),
            finish=jnp.zeros(sequences, jnp.int32),
        ),
        counters=Counters(*(jnp.zeros((), jnp.int32) for _ in range(3))),
    )


def known_text(queue, state, sequence):
    """Tokens of sequences, prompt first, `[S, LONGEST + NEW]`."""
    place = jnp.arange(LONGEST + NEW)
    prompt = queue.prompt[sequence]
    new = place - queue.lengths[prompt][:, None]
    old = queue.tokens.at[queue.offsets[prompt][:, None] + place].get(mode="clip")
    return jnp.where(new < 0, old, jnp.take_along_axis(state.outputs.tokens[sequence], jnp.clip(new, 0, NEW - 1), 1))


def paged_text(pages, table):
    """What the pages of each slot say: tokens and positions, `[S, M * p]`."""
    rows = pages.keys[0][:, 0].at[table].get(mode="fill", fill_value=-1)
    rows = rows.reshape(table.shape[0], -1, 2).astype(jnp.int32)
    return rows[..., 0], rows[..., 1]


def violations(queue, state):
    """The invariants of the architecture; a row of booleans, true where one is broken."""
    (slots, columns), total = state.table.table.shape, state.pages.num_pages
    table, held, context = state.table.table, state.table.num_pages, state.slots.context
    owned = jnp.arange(columns) < held[:, None]
    named = jnp.zeros(total, jnp.int32).at[jnp.where(owned, table, total)].add(1, mode="drop")
    in_order = jnp.sort(jnp.where(owned, table, total + jnp.arange(columns)), axis=1)
    is_free = state.slots.sequence < 0
    running = jnp.sort(jnp.where(is_free, -1 - jnp.arange(slots), state.slots.sequence))
    tokens, positions = paged_text(state.pages, table)
    written = jnp.arange(tokens.shape[1]) < context[:, None]
    text = jnp.pad(known_text(queue, state, jnp.maximum(state.slots.sequence, 0)), ((0, 0), (0, tokens.shape[1])))
    return jnp.stack(
        [
            jnp.any(named != state.table.ref_counts),
            jnp.any(jnp.where(owned, table >= total, table != total)),
            jnp.any(in_order[:, 1:] == in_order[:, :-1]),
            jnp.any(is_free & ((held > 0) | (context > 0))),
            jnp.any(context > held * state.pages.page_size),
            jnp.any(running[1:] == running[:-1]),
            jnp.any(written & (positions != jnp.arange(tokens.shape[1]))),
            jnp.any(written & (tokens != text[:, : tokens.shape[1]])),
        ]
    )


VIOLATIONS = (
    "reference counts are the occurrences in the table",
    "rows name pages of the pool up to their count and none past it",
    "a row names no page twice",
    "a free slot holds nothing",
    "keys lie within the pages held",
    "a sequence runs in one slot",
    "pages hold the positions of their sequence",
    "pages hold the text of their sequence",
    "every step computes something, within its budget",
)


def fake_step(queue, state, num_tokens, max_q_len):
    """A step with the stand-in; also whether it broke the last invariant."""
    state, batch = plan(queue, state, num_tokens, max_q_len)
    column = batch.positions // state.pages.page_size
    page = batch.page_table.at[batch.slot_of_token, column].get(mode="fill", fill_value=state.pages.num_pages)
    rows = jnp.stack([batch.tokens, batch.positions], -1).astype(jnp.float32)
    keys = state.pages.keys[0].at[page, 0, batch.positions % state.pages.page_size].set(rows, mode="drop")
    pages = KVPages((keys,), state.pages.values)
    tokens, _ = paged_text(pages, batch.page_table)
    place = jnp.arange(tokens.shape[1])
    sample = queue.sample[jnp.maximum(state.slots.sequence, 0)]
    token = (jnp.sum(jnp.where(place < batch.kv_lens[:, None], tokens * (place + 3), 0), 1) + 7 * sample) % 23
    computed = batch.cu_q_lens[-1]
    logprob = jnp.zeros(token.shape)
    return advance(queue, state, batch, pages, token, logprob), (computed == 0) | (computed > num_tokens)


@functools.partial(jax.jit, static_argnames="capacity")
def run_trace(queue, state, capacity):
    """Run to the end (or 2,000 steps, which no trace needs); the final state and the invariants broken on the way."""

    def body(carry):
        state, broken, count = carry
        state, idle = jax.lax.cond(
            has_prompts(queue, state),
            lambda state: fake_step(queue, state, capacity.token_budget, None),
            lambda state: fake_step(queue, state, capacity.slots, 1),
            state,
        )
        idle &= capacity.steps_per_sync == 1  # else slots that ended wait for the next look at the queue
        broken |= jnp.append(violations(queue, state), idle)
        look = count % capacity.steps_per_sync == 0
        state = jax.lax.cond(look, functools.partial(admit, queue), lambda state: state, state)
        return state, broken | jnp.append(violations(queue, state), False), count + 1

    def goes_on(carry):
        return unfinished(carry[0]) & (carry[2] < 2000)

    broken = jnp.zeros(len(VIOLATIONS), bool)
    state, broken, _ = jax.lax.while_loop(goes_on, body, (admit(queue, state), broken, 0))
    return state, broken


def finish_trace(queue, state, capacity):
    state, broken = jax.device_get(run_trace(queue, state, capacity))
    assert not broken.any(), [name for name, flag in zip(VIOLATIONS, broken, strict=True) if flag]
    assert not (state.outputs.finish == Finish.RUNNING).any(), "every request ends"
    assert not state.table.ref_counts.any(), "everything is given back"
    for sequence, (out, reason) in enumerate(expected_outputs(queue)):
        assert state.outputs.tokens[sequence, : state.outputs.lengths[sequence]].tolist() == out
        assert state.outputs.finish[sequence] == reason
    return state


def expected_outputs(queue):
    """Each sequence on its own, in plain Python."""
    host = jax.device_get(queue)
    for prompt, sample, limit in zip(host.prompt, host.sample, host.limits, strict=True):
        begin = host.offsets[prompt]
        text = host.tokens[begin : begin + host.lengths[prompt]].tolist()
        out, reason = [], Finish.RUNNING
        while reason == Finish.RUNNING:
            out.append(int(sum(token * (place + 3) for place, token in enumerate(text)) + 7 * sample) % 23)
            text.append(out[-1])
            reason = Finish.STOP if out[-1] in host.stop_ids[prompt] else Finish.LENGTH if len(out) == limit else reason
        yield out, reason


@st.composite
def traces(draw):
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=PROMPTS, max_size=PROMPTS))
    limits = draw(st.lists(st.integers(1, NEW), min_size=PROMPTS, max_size=PROMPTS))
    # Few shapes, few programs: from a pool that just holds the longest sequence to one where nothing is ever short.
    samples, slots, page_size, pages, budget, steps = draw(
        st.sampled_from(
            [(1, 1, 4, 9, 1, 1), (1, 4, 4, 9, 16, 2), (3, 4, 4, 12, 4, 1), (3, 5, 8, 6, 16, 1), (4, 3, 2, 30, 16, 3)]
        )
    )
    return (
        lengths,
        limits,
        Capacity(slots, pages, 0, page_size, budget, NEW, samples, steps, "float32"),
        draw(st.integers(0, 2**16)),
    )


@hypothesis.settings(max_examples=1500, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(traces())
def test_random_traces(trace):
    lengths, limits, capacity, seed = trace
    queue = make_queue(lengths, limits, capacity.samples, seed)
    finish_trace(queue, make_state(queue, capacity.slots, capacity.pages, capacity.page_size), capacity)


def test_pool_for_just_one():
    """With pages for one sequence at a time, all finish."""
    queue = make_queue([LONGEST] * PROMPTS, [NEW] * PROMPTS, 2, seed=1)
    pages = pages_for(LONGEST + NEW - 1, 4)
    finish_trace(queue, make_state(queue, 4, pages, 4), Capacity(4, pages, 0, 4, 16, NEW, 2, 1, "float32"))


def test_newest_is_preempted_and_comes_back():
    queue = make_queue([20] * PROMPTS, [NEW] * PROMPTS, 1, seed=3)
    queue = dataclasses.replace(queue, stop_ids=queue.stop_ids - 99)  # nobody stops early
    state = finish_trace(queue, make_state(queue, 3, 18, 4), Capacity(3, 18, 0, 4, 64, NEW, 1, 1, "float32"))
    assert state.counters.preemptions > 0


def test_samples_share_pages():
    """Samples of one prompt hold its full pages once, and only the page that each writes to is its own."""
    queue = make_queue([22] * PROMPTS, [NEW] * PROMPTS, 4, seed=2)
    queue = dataclasses.replace(queue, order=jnp.arange(PROMPTS * 4, dtype=jnp.int32))
    state = admit(queue, make_state(queue, 4, 40, 4))
    assert np.asarray(state.slots.sequence).tolist() == [0, 4, 8, 12], "one sample of each prompt reads it"
    state, _ = fake_step(queue, state, 128, None)
    others = jnp.array([False, True, True, True])
    state = dataclasses.replace(
        state,
        table=state.table.release(others),
        slots=Slots(jnp.where(others, -1, state.slots.sequence), jnp.where(others, 0, state.slots.context)),
    )
    state = admit(queue, state)
    assert not violations(queue, state).any()
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
    state = admit(queue, make_state(queue, 3, 40, 4))
    assert np.asarray(state.slots.sequence).tolist() == [2, 4, 5]
