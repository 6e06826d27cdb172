"""Prefix caching on the device: pages are found again by their text, and by nothing else."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from fake_model import EVERYTHING, LONGEST, NEW, PROMPTS, Sizes, ask, finish_trace, make_queue, make_state
from hypothesis import strategies as st

from dsjax.ragged.page_table import NEVER, Contents, PageTable
from dsjax.ragged.prefix import Prefixes, hash_token

ROOMY = Sizes(slots=4, pages=60, page_size=4, token_budget=32, caching=True)
TIGHT = Sizes(slots=3, pages=13, page_size=4, token_budget=8, samples=3, steps_per_sync=2, caching=True, buckets=4)


GROUPED = Sizes(slots=3, pages=37, page_size=4, token_budget=8, samples=3, steps_per_sync=2, caching=True, groups=3)


def related_texts(rng, families=2):
    """Prompts that begin as one of a few texts do, for a while."""
    bases = rng.integers(0, 50, (families, LONGEST))
    cut = rng.integers(0, LONGEST + 1, PROMPTS)[:, None]
    return np.where(np.arange(LONGEST) < cut, bases[rng.integers(0, families, PROMPTS)], rng.integers(0, 50, LONGEST))


@st.composite
def histories(draw):
    """Rounds of requests over the same pages; and a window."""
    rounds = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, LONGEST) | st.just(LONGEST), min_size=PROMPTS, max_size=PROMPTS))
        limits = draw(st.lists(st.integers(1, NEW), min_size=PROMPTS, max_size=PROMPTS))
        rounds.append((lengths, limits, draw(st.integers(0, 2**16)), draw(st.booleans())))
    window = draw(st.just(EVERYTHING) | st.integers(1, 13))
    sizes = draw(st.sampled_from([ROOMY, TIGHT, GROUPED]))
    return rounds, sizes, window, draw(st.integers(0, 3)) * sizes.groups, draw(st.booleans())


@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(histories())
def test_random_histories(history):
    """Later requests find pages of earlier ones, in pools of any size, with windows, groups, samples and preemption."""
    rounds, sizes, window, held, same_texts = history
    state = None
    for lengths, limits, seed, has_salts in rounds:
        rng = np.random.default_rng(rounds[0][2] if same_texts else seed)
        salts = rng.integers(0, 2, PROMPTS) if has_salts else None
        queue = make_queue(lengths, limits, sizes.samples, seed, related_texts(rng), salts)
        if state is None:
            state = make_state(queue, sizes, held)
        state = finish_trace(queue, ask(queue, state, sizes), sizes, jnp.int32(window))


def asked_twice(sizes, salts=(0, 0), window=EVERYTHING, **changes):
    """Prompt tokens found by the first and by the second run of the same requests, and what each computed."""
    found, computed, state = [], [], None
    for salt in salts:
        lengths = [LONGEST, 23, 21, 20, 9, 8]
        queue = make_queue(lengths, [NEW] * PROMPTS, sizes.samples, 5, salts=[salt] * PROMPTS)
        queue = dataclasses.replace(queue, stop_ids=queue.stop_ids - 99, **changes)
        state = make_state(queue, sizes) if state is None else ask(queue, state, sizes)
        state = finish_trace(queue, state, sizes, jnp.int32(window))
        found.append(int(state.prefixes.found))
        computed.append(int(state.counters.tokens))
    return np.diff(found, prepend=0).tolist(), np.diff(computed, prepend=0).tolist()


def test_second_run_finds_all_full_pages():
    """All but the last token may be found: of 24, 23, 21, 20, 9 and 8 tokens in pages of 4, 20, 20, 20, 16, 8 and 4."""
    found, computed = asked_twice(ROOMY)
    assert found == [0, 88]
    prompts = LONGEST + 23 + 21 + 20 + 9 + 8
    assert computed == [prompts + PROMPTS * (NEW - 1), prompts + PROMPTS * (NEW - 1) - 88]


def test_salts_do_not_share():
    assert asked_twice(ROOMY, salts=(1, 2))[0] == [0, 0]


def test_pages_behind_a_window_are_not_needed():
    """The window's pages are enough, whatever became of those before; and nothing else changes what is found."""
    assert asked_twice(ROOMY, window=6)[0] == [0, 88]


def test_identical_prompts_are_read_once():
    """Who arrives with a text that another reads waits for its pages, and computes what no page holds whole."""
    text = np.tile(np.random.default_rng(0).integers(0, 50, LONGEST), (PROMPTS, 1))
    queue = make_queue([LONGEST] * PROMPTS, [1] * PROMPTS, 1, 0, text)
    state = finish_trace(queue, make_state(queue, ROOMY), ROOMY, jnp.int32(EVERYTHING))
    assert int(state.counters.tokens) == LONGEST + (PROMPTS - 1) * 4, "20 of 24 tokens are shared, in pages of 4"
    assert int(state.prefixes.found) == (PROMPTS - 1) * 20


def test_preempted_finds_its_own_pages():
    """What a sequence had computed before it lost its pages is not computed again while they are free."""
    queue = make_queue([20] * PROMPTS, [NEW] * PROMPTS, TIGHT.samples, seed=3)
    queue = dataclasses.replace(queue, stop_ids=queue.stop_ids - 99)
    state = finish_trace(queue, make_state(queue, TIGHT), TIGHT, jnp.int32(EVERYTHING))
    assert state.counters.preemptions > 0
    assert int(state.prefixes.found) > 0, "no two prompts are alike, so these are pages of their own"


def test_full_buckets_lose_hits_only():
    """Four pages of one bucket are found, whenever they came; a fifth takes the place of one, as random ones above."""
    pages = np.arange(6)
    keys = np.random.default_rng(0).integers(0, 2**32, (6, 4), dtype=np.uint32)
    insert, lookup = jax.jit(Prefixes.insert), jax.jit(Prefixes.lookup)
    for rounds in ([0, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]):  # which pages are filled together
        prefixes, contents = Prefixes.empty(1, 1, 6), Contents.empty(6)
        prefixes = dataclasses.replace(prefixes, index=prefixes.index[:1])
        for begin, end in itertools.pairwise(rounds):
            filled = np.where((pages >= begin) & (pages < end), pages, 6)
            prefixes, contents = insert(prefixes, contents, filled, keys)
        assert lookup(prefixes, contents, keys).tolist() == [0, 1, 2, 3, 6, 6]
    prefixes, contents = insert(prefixes, contents, np.where(pages == 1, 1, 6), keys)
    assert lookup(prefixes, contents, keys).tolist() == [0, 1, 2, 3, 6, 6], "it was there already"
    more, contents = insert(prefixes, contents, np.where(pages == 5, 5, 6), keys)
    found = lookup(more, contents, keys)
    assert found[5] == 5 and (found[:5] < 6).sum() == 3 and set(found.tolist()) <= {*range(4), 5, 6}
    written = contents.forget(jnp.array([2]))
    assert lookup(prefixes, written, keys).tolist() == [0, 1, 6, 3, 6, 6]
    prefixes, written = insert(prefixes, written, np.where(pages == 4, 4, 6), keys)
    assert lookup(prefixes, written, keys).tolist() == [0, 1, 6, 3, 4, 6], "the entry of a page written anew is free"


def test_clock_is_put_back():
    """At half of the largest number; nothing is lost or taken for younger than it is."""
    queue = make_queue([LONGEST] * PROMPTS, [NEW] * PROMPTS, 1, 7)
    state = make_state(queue, ROOMY)
    clock = jnp.int32(NEVER // 2 - 100)
    contents = dataclasses.replace(state.table.contents, clock=clock)
    state = dataclasses.replace(state, table=dataclasses.replace(state.table, contents=contents))
    for _ in range(3):
        state = finish_trace(queue, ask(queue, state, ROOMY), ROOMY, jnp.int32(EVERYTHING))
    contents = state.table.contents
    assert 0 < contents.clock < NEVER // 4
    assert (contents.released >= 0).all() and (contents.released <= contents.clock).all()
    assert int(state.prefixes.found) > 0


def test_longest_unused_goes_first():
    """Pages with nothing to find, then the longest free; of one text the end before the beginning."""

    @jax.jit
    def orders():
        table = PageTable.empty(3, 4, 12, caching=True)
        rows = jnp.array([[0, 1, 2, 12], [0, 1, 3, 4], [5, 12, 12, 12]])
        table = table.assign(jnp.arange(3), rows, jnp.array([3, 4, 1]), rows < 12)
        keys = table.contents.keys.at[:6].set(1 + jnp.arange(6, dtype=jnp.uint32)[:, None])
        table = dataclasses.replace(table, contents=dataclasses.replace(table.contents, keys=keys))
        for slot in (1, 2, 0):
            table = table.release(jnp.arange(3) == slot)
        again = table.assign(jnp.arange(1), jnp.array([[4, 12, 12, 12]]), jnp.array([1]), jnp.zeros((1, 4), bool))
        return table.free_list(12), again.release(jnp.arange(3) == 0).free_list(14)

    first, second = (order.tolist() for order in jax.device_get(orders()))
    assert sorted(first[:6]) == [6, 7, 8, 9, 10, 11]
    assert first[6:] == [4, 3, 5, 2, 1, 0], "of two that share 0 and 1 the last one counts"
    assert second[6:] == [3, 5, 2, 1, 0, 4, 12, 12], "used again, so the youngest"


def numpy_keys(texts, lengths, salts, page_size):
    """Keys in plain integers: 32-bit words of the sum of each token's hash."""
    factors = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)

    def scramble(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x ^ (x >> 16)

    columns = texts.shape[1] // page_size
    out = np.zeros((len(texts), columns, 4), np.uint32)
    for row, (text, length, salt) in enumerate(zip(texts.tolist(), lengths, salts, strict=True)):
        total = [0] * 4
        for place in range(columns * page_size):
            if place < length:
                for word, (factor, other) in enumerate(zip(factors, factors[::-1], strict=True)):
                    x = scramble((text[place] ^ salt) * factor + other & 0xFFFFFFFF)
                    total[word] += scramble(x ^ (place * other + salt & 0xFFFFFFFF))
            out[row, place // page_size] = [word & 0xFFFFFFFF for word in total]
    return out


def test_keys_grow_in_any_order():
    """In pieces and token by token they come to what the whole text gives, and that to plain integers."""
    rng = np.random.default_rng(0)
    rows, page_size, length, final = 5, 4, np.array([1, 4, 7, 13, 16]), 20
    texts = rng.integers(0, 2**17, (rows, final))
    salts = rng.integers(0, 2**32, rows, dtype=np.uint32)
    empty = Prefixes.empty(rows, final // page_size, 32)
    whole = empty.enter_whole(jnp.asarray(texts), jnp.full(rows, final), jnp.asarray(salts)).of_text
    np.testing.assert_array_equal(whole, numpy_keys(texts, [final] * rows, salts.tolist(), page_size))

    row, place = np.nonzero(np.arange(final) < length[:, None])
    order = rng.permutation(len(row))
    pieces = np.array_split(order, 3)
    enter = jax.jit(functools.partial(Prefixes.enter, page_size=page_size))
    prefixes = empty
    for index, piece in enumerate(pieces):
        piece = np.resize(piece, len(order))  # padded with rows to leave out
        padding = np.arange(len(order)) >= len(pieces[index])
        owner = np.where(padding, rows, row[piece])
        complete = np.arange(rows) if index == 2 else np.full(rows, rows)
        salt = salts[np.minimum(owner, rows - 1)]
        prefixes = enter(prefixes, owner, place[piece], texts[row[piece], place[piece]], salt, complete)
    expected = empty.enter_whole(jnp.asarray(texts), jnp.asarray(length), jnp.asarray(salts)).of_text
    np.testing.assert_array_equal(prefixes.of_text, expected)

    append = jax.jit(functools.partial(Prefixes.append, page_size=page_size))
    for position in range(1, final):
        growing = np.where(position >= length, np.arange(rows), rows)
        prefixes = append(prefixes, growing, np.full(rows, position), texts[:, position], salts)
        known = np.maximum(position + 1, length)
        full = np.arange(final // page_size) < (known // page_size)[:, None]
        np.testing.assert_array_equal(np.asarray(prefixes.of_text)[full], np.asarray(whole)[full])
    np.testing.assert_array_equal(prefixes.of_text, whole)


def test_no_two_texts_have_one_key():
    """Of a million of every kind that a sum might confuse: shuffled, shifted, one token changed, small tokens."""
    rng = np.random.default_rng(0)
    count, length = 250_000, 8
    texts = rng.integers(0, 2**15, (count, length))
    kinds = [
        (texts, np.zeros(count, np.int64), np.zeros(count, np.int64)),
        (np.array([rng.permutation(length) for _ in range(1000)])[rng.integers(0, 1000, count)], 0, np.arange(count)),
        (np.repeat(texts[: count // 50], 50, 0), np.tile(np.arange(50), count // 50), 0),
        ((np.arange(count)[:, None] >> (2 * np.arange(length))) & 3, 1000, 7),
    ]
    hash_all = jax.jit(
        lambda text, first, salt: sum(hash_token(text[:, i], first + i, salt.astype(jnp.uint32)) for i in range(length))
    )
    asked, keys = [], []
    for text, first, salt in kinds:
        first, salt = (np.broadcast_to(x, count).astype(np.int32) for x in (first, salt))
        asked.append(np.column_stack([text, first, salt]).astype(np.int32))
        keys.append(np.asarray(hash_all(asked[-1][:, :length], first, salt)))
    asked, keys = np.concatenate(asked), np.concatenate(keys)
    distinct = np.unique(asked.view([("", np.void, asked.itemsize * asked.shape[1])]))
    for words in (slice(0, 2), slice(2, 4)):  # each half alone tells them apart, but for one chance in 10^7
        assert len(np.unique(np.ascontiguousarray(keys[:, words]).view(np.uint64))) == len(distinct)
