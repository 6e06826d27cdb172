"""What tests of the scheduler share: a stand-in for the model, the invariants, and runs to the end.

The stand-in writes (token, position, digest of the text so far) into the pages where a model would write keys, and
draws tokens from a hash of the text read back from the pages. So a page that is shared wrongly, copied late, reused
early or given back early shows as a wrong text.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.ragged.groups import PageGroups, pages_for
from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.prefix import Prefixes
from dsjax.ragged.schedule import admit, advance, has_prompts, plan, unfinished
from dsjax.ragged.state import FREE, HELD, Counters, Finish, Outputs, Queue, Sampling, Slots, State

PROMPTS, LONGEST, NEW = 6, 24, 10
STOP = 3
EVERYTHING = 10_000  # a window that hides nothing
HELD_MARK = -7


class Sizes(NamedTuple):
    """Static sizes of a trace."""

    slots: int
    pages: int
    page_size: int
    token_budget: int
    samples: int = 1
    steps_per_sync: int = 1
    caching: bool = False
    buckets: int | None = None  # of the index, else as many as it has
    split_fuse: bool = True
    groups: int = 1  # of layers; all but the last see everything

    @property
    def columns(self):
        return pages_for(LONGEST + NEW, self.page_size)

    def page_groups(self, window):
        """Groups of which the last has a window, which may be traced."""
        most = None if window is None else pages_for(window - 1 + self.token_budget, self.page_size) + 1
        return PageGroups((None,) * (self.groups - 1) + (window,), (None,) * (self.groups - 1) + (most,))


def make_queue(lengths, limits, samples, seed, texts=None, salts=None):
    """Prompts `texts [PROMPTS, LONGEST]`, by default random ones, in random order."""
    rng = np.random.default_rng(seed)
    count = jnp.zeros(PROMPTS)
    sequences = PROMPTS * samples
    texts = rng.integers(0, 50, (PROMPTS, LONGEST)) if texts is None else texts
    return Queue(
        tokens=jnp.asarray(texts, jnp.int32).reshape(-1),
        offsets=jnp.arange(PROMPTS, dtype=jnp.int32) * LONGEST,
        lengths=jnp.asarray(lengths, jnp.int32),
        keys=jax.random.split(jax.random.key(0), PROMPTS),
        sampling=Sampling(count, count, count, count, count, None),
        stop_ids=jnp.full((PROMPTS, 1), STOP, jnp.int32),
        prompt=jnp.arange(sequences, dtype=jnp.int32) // samples,
        sample=jnp.arange(sequences, dtype=jnp.int32) % samples,
        limits=jnp.asarray(limits, jnp.int32)[jnp.arange(sequences) // samples],
        order=jnp.asarray(rng.permutation(sequences), jnp.int32),
        salt=jnp.asarray(np.zeros(PROMPTS) if salts is None else salts, jnp.uint32),
    )


def make_state(queue, sizes, held=0):
    """Nothing computed; the last slot is held by somebody else if `held` pages are."""
    (slots, pages, page_size), sequences = sizes[:3], queue.prompt.shape[0]
    pool = np.full((pages, 1, page_size, 3), -1)
    pool[:held] = HELD_MARK
    table = PageTable.empty(slots, sizes.columns, pages, sizes.caching, sizes.groups)
    sequence, context = np.full(slots, FREE), np.zeros(slots)
    if held:
        rows = np.array(table.table)
        assert held % sizes.groups == 0
        for group, pages_of in enumerate(np.split(np.arange(held), sizes.groups)):
            rows[-1, group * sizes.columns :][: len(pages_of)] = pages_of
        sequence[-1], context[-1] = HELD, held // sizes.groups * page_size - 1
        table = dataclasses.replace(
            table,
            table=jnp.asarray(rows),
            num_pages=table.num_pages.at[-1].set(held // sizes.groups),
            ref_counts=table.ref_counts.at[:held].set(1),
        )
    state = State(
        pages=KVPages((jnp.asarray(pool, jnp.int32),), ()),
        table=table,
        slots=Slots(jnp.asarray(sequence, jnp.int32), jnp.asarray(context, jnp.int32)),
        outputs=no_outputs(sequences),
        counters=Counters.zero(),
        prefixes=make_prefixes(sequences, sizes),
    )
    return ask(queue, state, sizes)


def make_prefixes(sequences, sizes):
    if not sizes.caching:
        return None
    prefixes = Prefixes.empty(sequences, sizes.columns, sizes.pages)
    return dataclasses.replace(prefixes, index=prefixes.index[: sizes.buckets])


def no_outputs(sequences):
    return Outputs(
        tokens=jnp.zeros((sequences, NEW), jnp.int32),
        logprobs=jnp.zeros((sequences, NEW)),
        sampling_logprobs=None,
        lengths=jnp.zeros(sequences, jnp.int32),
        finish=jnp.zeros(sequences, jnp.int32),
    )


def ask(queue, state, sizes):
    """Other requests over the same pages: what these hold of earlier ones may be found again."""
    state = dataclasses.replace(state, outputs=no_outputs(queue.prompt.shape[0]))
    return enter_texts(queue, state, sizes) if sizes.caching else state


@functools.partial(jax.jit, static_argnames="sizes")
def enter_texts(queue, state, sizes):
    texts = known_text(queue, state, jnp.arange(queue.prompt.shape[0]))
    texts = jnp.pad(texts, ((0, 0), (0, sizes.columns * sizes.page_size - texts.shape[1])))
    prefixes = state.prefixes.enter_whole(texts, queue.lengths[queue.prompt], queue.salt[queue.prompt])
    return dataclasses.replace(state, prefixes=prefixes)


def known_text(queue, state, sequence):
    """Tokens of sequences, prompt first, `[S, LONGEST + NEW]`."""
    place = jnp.arange(LONGEST + NEW)
    prompt = queue.prompt[sequence]
    new = place - queue.lengths[prompt][:, None]
    old = queue.tokens.at[queue.offsets[prompt][:, None] + place].get(mode="clip")
    return jnp.where(new < 0, old, jnp.take_along_axis(state.outputs.tokens[sequence], jnp.clip(new, 0, NEW - 1), 1))


def known_rows(queue, state):
    """What the pages of each slot should hold at every place, `[S, M * p, 3]`."""
    sequence = jnp.maximum(state.slots.sequence, 0)
    text = known_text(queue, state, sequence)
    text = jnp.pad(text, ((0, 0), (0, state.table.columns * state.pages.page_size - text.shape[1])))
    place = jnp.arange(text.shape[1])
    salt = queue.salt[queue.prompt[sequence]].astype(jnp.int32)
    digest = jnp.cumsum((text + 1) * (place * 48271 + 11), axis=1, dtype=jnp.int32) + salt[:, None]
    return jnp.stack([text, jnp.broadcast_to(place, text.shape), digest], -1)


def paged_rows(pages, table):
    """What the pages of each slot say, `[S, M * p, 3]`; -1 where there is none."""
    return pages.keys[0][:, 0].at[table].get(mode="fill", fill_value=-1).reshape(table.shape[0], -1, 3)


def violations(queue, state, groups):
    """The invariants of the architecture; a row of booleans, true where one is broken."""
    slots, columns = state.table.table.shape[0], state.table.columns
    total, page_size = state.pages.num_pages, state.pages.page_size
    table, num_pages, context = state.table.table, state.table.num_pages, state.slots.context
    active, is_free = state.slots.sequence >= 0, state.slots.sequence == FREE
    named = jnp.zeros(total, jnp.int32).at[table].add(1, mode="drop")
    running = jnp.sort(jnp.where(active, state.slots.sequence, -1 - jnp.arange(slots)))
    owned, wrong = [], False
    for window, row in zip(groups.windows, jnp.split(table, groups.count, axis=1), strict=True):
        first_seen = jnp.maximum(context - (EVERYTHING if window is None else window) + 1, 0)
        behind = active[:, None] & ((jnp.arange(columns) + 1) * page_size <= first_seen[:, None])
        owned.append((jnp.arange(columns) < num_pages[:, None]) & ~behind)
        rows = paged_rows(state.pages, row)
        place = jnp.arange(rows.shape[1])
        seen = active[:, None] & (place < context[:, None]) & (place >= first_seen[:, None])
        wrong |= jnp.any(seen[..., None] & (rows != known_rows(queue, state)))
    owned = jnp.concatenate(owned, axis=1)
    in_order = jnp.sort(jnp.where(owned, table, total + jnp.arange(table.shape[1])), axis=1)
    held_rows = jnp.where(owned, table, total)[state.slots.sequence.argmin()]
    untouched = jnp.all(state.pages.keys[0].at[held_rows].get(mode="fill", fill_value=HELD_MARK) == HELD_MARK)
    broken = [
        jnp.any(named != state.table.ref_counts),
        jnp.any(jnp.where(owned, table >= total, table != total)),
        jnp.any(in_order[:, 1:] == in_order[:, :-1]),
        jnp.any(is_free & ((num_pages > 0) | (context > 0))),
        jnp.any(context > num_pages * page_size),
        jnp.any(running[1:] == running[:-1]),
        wrong,
        jnp.any(state.slots.sequence == HELD) & ~untouched,
    ]
    if state.prefixes is None:
        return jnp.stack([*broken, False])
    keys, held = state.table.contents.keys, state.pages.keys[0][:, 0]
    is_cached = jnp.any(keys != 0, axis=1)
    differ = jnp.any(held[:, None] != held, axis=(2, 3)) & jnp.all(keys[:, None] == keys, axis=-1)
    is_full = jnp.all(held[..., 1] == held[:, :1, 1] // page_size * page_size + jnp.arange(page_size), axis=1)
    return jnp.stack([*broken, jnp.any(is_cached & (jnp.any(differ, axis=1) | ~is_full))])


VIOLATIONS = (
    "reference counts are the occurrences in the table",
    "rows name pages of the pool up to their count, none past it, none behind the window, and all within it",
    "a row names no page twice",
    "a free slot holds nothing",
    "keys lie within the pages held",
    "a sequence runs in one slot",
    "pages hold the text of their sequence",
    "pages of others are not touched",
    "pages with one key hold the same text",
    "every step computes or preempts something, within its budget",
    "without cutting, prompts are read whole and alone",
)


def fake_step(queue, state, num_tokens, max_q_len=None, groups=None, split_fuse=True):
    """A step with the stand-in; also whether it broke the last two invariants."""
    groups = groups or PageGroups()
    pending = jnp.where(state.slots.sequence >= 0, state.outputs.lengths[state.slots.sequence], 0)
    pending += queue.lengths[queue.prompt[state.slots.sequence]] - state.slots.context
    preemptions = state.counters.preemptions
    state, batch = plan(queue, state, num_tokens, max_q_len, split_fuse=split_fuse)
    page_size, pages = state.pages.page_size, state.pages
    digest = known_rows(queue, state)[..., 2].at[batch.slot_of_token, batch.positions].get(mode="clip")
    rows = jnp.stack([batch.tokens, batch.positions, digest], -1)
    seen = 0
    for group, window in enumerate(groups.windows):
        table = jnp.split(batch.page_table, groups.count, axis=1)[group]
        page = table.at[batch.slot_of_token, batch.positions // page_size].get(mode="fill", fill_value=pages.num_pages)
        pages = KVPages((pages.keys[0].at[page, 0, batch.positions % page_size].set(rows, mode="drop"),), ())
        tokens = paged_rows(pages, table)[..., 0]
        place = jnp.arange(tokens.shape[1])
        visible = place < batch.kv_lens[:, None]
        if window is not None:
            visible &= place >= batch.kv_lens[:, None] - window
        seen += (group + 1) * jnp.sum(jnp.where(visible, tokens * (place + 3), 0), 1)
    sample = queue.sample[jnp.maximum(state.slots.sequence, 0)]
    token = (seen + 7 * sample) % 23
    q_lens = jnp.diff(batch.cu_q_lens)
    computed = batch.cu_q_lens[-1]
    cut = jnp.any(q_lens > 1) & jnp.any((q_lens > 0) & ((q_lens != pending) | (q_lens == 1)))
    idle = (computed == 0) & (state.counters.preemptions == preemptions)
    state, _ = advance(queue, state, batch, pages, token, jnp.zeros(token.shape), groups=groups)
    return state, jnp.stack([idle | (computed > num_tokens), cut & (not split_fuse)])


@functools.partial(jax.jit, static_argnames="sizes")
def run_trace(queue, state, window, sizes):
    """Run to the end (or 2,000 steps, which no trace needs); the final state and the invariants broken on the way."""
    groups = sizes.page_groups(window)

    def step(num_tokens, max_q_len):
        return lambda state: fake_step(queue, state, num_tokens, max_q_len, groups, sizes.split_fuse)

    def body(carry):
        state, broken, count = carry
        reads = has_prompts(queue, state)
        state, of_step = jax.lax.cond(reads, step(sizes.token_budget, None), step(sizes.slots, 1), state)
        of_step &= jnp.array([sizes.steps_per_sync == 1, True])  # slots that ended wait for the next look at the queue
        broken |= jnp.concatenate([violations(queue, state, groups), of_step])
        look = count % sizes.steps_per_sync == 0
        state = jax.lax.cond(look, lambda state: admit(queue, state, groups), lambda state: state, state)
        return state, broken | jnp.append(violations(queue, state, groups), jnp.zeros(2, bool)), count + 1

    def goes_on(carry):
        return unfinished(carry[0]) & (carry[2] < 2000)

    broken = jnp.zeros(len(VIOLATIONS), bool)
    state, broken, _ = jax.lax.while_loop(goes_on, body, (admit(queue, state, groups), broken, 0))
    return state, broken


def finish_trace(queue, state, sizes, window=None):
    """Run to the end, and compare with each sequence on its own; returns the state."""
    held = int(np.sum(state.slots.sequence == HELD) and state.table.num_pages[-1]) * sizes.groups
    state, broken = run_trace(queue, state, window, sizes)
    assert not np.any(broken), [name for name, flag in zip(VIOLATIONS, np.asarray(broken), strict=True) if flag]
    outputs = jax.device_get(state.outputs)
    assert not (outputs.finish == Finish.RUNNING).any(), "every request ends"
    assert np.asarray(state.table.ref_counts).tolist() == [1] * held + [0] * (sizes.pages - held), "all is given back"
    for sequence, (out, reason) in enumerate(expected_outputs(queue, window, sizes.groups)):
        assert outputs.tokens[sequence, : outputs.lengths[sequence]].tolist() == out
        assert outputs.finish[sequence] == reason
    return state


def expected_outputs(queue, window=None, groups=1):
    """Each sequence on its own, in plain Python."""
    host = jax.device_get(queue)
    for prompt, sample, limit in zip(host.prompt, host.sample, host.limits, strict=True):
        begin = host.offsets[prompt]
        text = host.tokens[begin : begin + host.lengths[prompt]].tolist()
        out, reason = [], Finish.RUNNING
        while reason == Finish.RUNNING:
            first = 0 if window is None else max(0, len(text) - int(window))
            seen = sum(
                (group + 1) * token * (place + 3)
                for group in range(groups)
                for place, token in enumerate(text)
                if group < groups - 1 or place >= first
            )
            out.append(int(seen + 7 * sample) % 23)
            text.append(out[-1])
            reason = Finish.STOP if out[-1] in host.stop_ids[prompt] else Finish.LENGTH if len(out) == limit else reason
        yield out, reason
