"""Cascade attention: sharing is found as a plain loop finds it, and the result is that of plain attention."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BACKENDS, answers, assert_exact, make_batch, run
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import SharedPrefix, cascade_attention, shared_prefixes
from pallas_kernels.ragged_paged_attention.cascade import merge
from pallas_kernels.ragged_paged_attention.shapes import DEEPSPEED_TOLERANCES

SLOTS, PAGE_SIZE, WIDTH, TOKENS = 6, 16, 5, 20
HEADS = (6, 2, 32)


@functools.partial(jax.jit, static_argnames=("max_q_len", "soft_cap", "return_lse", "implementation"))
def run_cascade(batch, **options):
    shared = shared_prefixes(batch["page_table"], batch["cu_q_lens"], batch["kv_lens"], PAGE_SIZE)
    return cascade_attention(**batch, shared=shared, **options), shared


def shared_by_loop(table, q_lens, kv_lens):
    """Keys that each slot shares with others, and the slot that leads it."""
    starts, leaders = [0] * len(table), list(range(len(table)))
    decoding = [s for s in range(len(table)) if q_lens[s] == 1]
    for leader in decoding:
        members = [s for s in decoding if table[s][0] == table[leader][0]]
        if leader != members[0]:
            continue
        pages = 0
        while (
            pages < min((kv_lens[s] - 1) // PAGE_SIZE for s in members) and len({table[s][pages] for s in members}) == 1
        ):
            pages += 1
        if len(members) > 1 and pages:
            for s in members:
                starts[s], leaders[s] = pages * PAGE_SIZE, leader
    return starts, leaders


def sharing_batch(slots, seed, **options):
    """Each slot `(prompt, pages of it, queries, keys)` begins with the pages that its prompt has in common."""
    rng = np.random.default_rng(seed)
    prompts, shared, q_lens, kv_lens = map(np.array, zip(*slots, strict=True))
    kv_lens = np.maximum(kv_lens, q_lens)
    whole = [WIDTH * PAGE_SIZE] * SLOTS
    batch = make_batch(rng, HEADS, [1] * SLOTS, whole, num_pages=2 * SLOTS * WIDTH, tokens=TOKENS, **options)
    table = np.array(batch["page_table"])[:, :WIDTH]
    # The pages of slot `prompt` are also those of its prompt.
    column = np.arange(WIDTH)
    table = np.where(column < shared[:, None], table[prompts], table)
    table = np.where(column * PAGE_SIZE < kv_lens[:, None], table, 10_000)
    batch["page_table"] = jnp.asarray(table)
    batch["cu_q_lens"] = jnp.asarray(np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32)
    batch["kv_lens"] = jnp.asarray(kv_lens, jnp.int32)
    batch["q"] = jnp.asarray(rng.normal(size=(TOKENS, *HEADS[::2])), batch["q"].dtype)
    return batch, (table, q_lens, kv_lens)


slots_that_share = st.tuples(
    *[
        st.tuples(
            st.integers(0, 2),
            st.integers(0, WIDTH),
            st.sampled_from([1, 1, 1, 1, 0, 3]),
            st.sampled_from([16, 48, 64, 80]) | st.integers(1, 80),
        )
    ]
    * SLOTS
)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "featured", "quantized"])
@hypothesis.settings(max_examples=15)
@hypothesis.given(slots=slots_that_share, seed=st.integers(0, 2**16))
def test_cascade_is_plain_attention(implementation, kind, slots, seed):
    """Any pattern of sharing, of slots that share nothing and of chunks among them."""
    kinds = {
        "plain": ({}, {}),
        "featured": ({"features": ["sinks"]}, {"soft_cap": 2.0}),
        "quantized": ({"stored": jnp.int8}, {"max_q_len": 1}),
    }
    made, options = kinds[kind]
    if "max_q_len" in options:
        slots = tuple((prompt, pages, min(q_len, 1), kv_len) for prompt, pages, q_len, kv_len in slots)
    batch, host = sharing_batch(slots, seed, **made)
    actual, shared = run_cascade(batch, **options, return_lse=True, implementation=implementation)
    options.pop("max_q_len", None)
    assert_exact(actual, batch, answers(batch, **options))

    starts, leaders = shared_by_loop(*host)
    np.testing.assert_array_equal(shared.kv_starts, starts)
    order = np.asarray(shared.order)
    np.testing.assert_array_equal(order[np.asarray(shared.rank)], np.arange(SLOTS))
    for group in range(SLOTS):
        members = [s for s in range(SLOTS) if leaders[s] == group and starts[s]]
        assert list(order[shared.cu_group_q_lens[group] : shared.cu_group_q_lens[group + 1]]) == members
        assert shared.prefix_lens[group] == (starts[group] if members else 0)


def test_worked_example():
    """The one in the docstring of `SharedPrefix`."""
    table = np.arange(5 * 4).reshape(5, 4)
    table[2, :3], table[4, 0] = table[0, :3], table[3, 0]
    shared = shared_prefixes(jnp.asarray(table), jnp.arange(6), jnp.full(5, 64), 16)
    expected = SharedPrefix(
        order=jnp.array([0, 2, 3, 4, 1]),
        rank=jnp.array([0, 4, 1, 2, 3]),
        cu_group_q_lens=jnp.array([0, 2, 2, 2, 4, 4]),
        prefix_lens=jnp.array([48, 0, 0, 16, 0]),
        kv_starts=jnp.array([48, 0, 48, 16, 16]),
    )
    jax.tree.map(np.testing.assert_array_equal, shared, expected)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(shared))


def test_one_key_stays_private():
    """Equal tables of 4 pages, one of which is just full: three are shared."""
    table = jnp.tile(jnp.arange(4), (2, 1))
    for kv_lens, keys in (([64, 64], 48), ([64, 49], 48), ([64, 48], 32), ([64, 16], 0), ([64, 0], 0)):
        shared = shared_prefixes(table, jnp.arange(3), jnp.array(kv_lens), 16)
        np.testing.assert_array_equal(shared.kv_starts, [keys, keys])


@pytest.mark.parametrize("implementation", BACKENDS)
def test_nothing_shared_changes_nothing(implementation):
    """Groups of one: what plain attention gives, but for how XLA contracts the interpreted kernel's sums."""
    batch, _ = sharing_batch([(0, 0, 1, 80 - s) for s in range(SLOTS)], seed=0)
    (out, lse), shared = run_cascade(batch, return_lse=True, implementation=implementation)
    assert not shared.kv_starts.any() and not shared.cu_group_q_lens.any()
    plain, plain_lse = run(batch, return_lse=True, implementation=implementation)
    np.testing.assert_allclose(out, plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, plain_lse, rtol=1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_sixteen_bits(implementation):
    """Both parts are rounded before they are merged, so it is held to DeepSpeed's tolerance alone."""
    batch, _ = sharing_batch([(0, 3, 1, 80 - s) for s in range(SLOTS)], seed=0, dtype=jnp.bfloat16)
    out, shared = run_cascade(batch, implementation=implementation)
    assert shared.prefix_lens[0] == 48
    relative, absolute = DEEPSPEED_TOLERANCES["bfloat16"]
    np.testing.assert_allclose(np.asarray(out, np.float64), answers(batch)[0][0], relative, absolute)


def test_merge_of_nothing(rng):
    out, other = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    lse = jnp.array([[0.0, 2.0, -jnp.inf]] * 2)
    merged, both = merge(out, lse, other, jnp.full((2, 3), -jnp.inf))
    np.testing.assert_array_equal(merged[:, :2], out[:, :2])
    np.testing.assert_array_equal(merged[:, 2], 0)
    np.testing.assert_array_equal(both, lse)


def test_what_can_not_be_shared(rng):
    attention = inspect.unwrap(cascade_attention)
    batch = make_batch(rng, (2, 2, 16), [1, 1], [20, 20])
    shared = shared_prefixes(batch["page_table"], batch["cu_q_lens"], batch["kv_lens"], PAGE_SIZE)
    with pytest.raises(ValueError, match="window can not be shared; call ragged_paged_attention for this layer"):
        attention(**batch, shared=shared, window=8)
    with pytest.raises(ValueError, match="alibi_slopes can not be shared"):
        attention(**batch, shared=shared, alibi_slopes=jnp.ones(2))


def test_groups_pass_through_transformations():
    arguments = jnp.zeros((3, 2), jnp.int32), jnp.arange(4), jnp.full(3, 20)
    shapes = jax.eval_shape(functools.partial(shared_prefixes, page_size=16), *arguments)
    assert shapes.cu_group_q_lens.shape == (4,)
    assert len(jax.tree.leaves(shapes)) == 5
