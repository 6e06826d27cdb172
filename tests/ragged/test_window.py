"""Sliding windows: pages behind them are given back as soon as no query sees them, and never earlier."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import LONGEST, NEW, PROMPTS, Sizes, finish_trace, make_queue, make_state
from hypothesis import strategies as st

import dsjax
from dsjax.ragged.groups import page_groups, pages_for
from pallas_kernels.ragged_paged_attention import ragged_paged_attention

SIZES = Sizes(slots=4, pages=25, page_size=4, token_budget=10, samples=3, groups=2)


@hypothesis.settings(max_examples=70, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=PROMPTS, max_size=PROMPTS),
    limits=st.lists(st.integers(1, NEW), min_size=PROMPTS, max_size=PROMPTS),
    window=st.integers(1, 13),
    held=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_random_traces_with_windows(lengths, limits, window, held, seed):
    """With samples whose prompt's first pages are gone, and preemption; beside layers that see everything.

    With prefix caching, and in one group: see `test_prefix`.
    """
    queue = make_queue(lengths, limits, SIZES.samples, seed)
    finish_trace(queue, make_state(queue, SIZES, held * SIZES.groups), SIZES, jnp.int32(window))


WINDOW, PAGE, NEW_TOKENS = 10, 8, 90


@pytest.fixture(scope="module")
def windowed(tiny_config):
    """A model of which every layer looks back a little, one of them less."""
    config = dataclasses.replace(tiny_config, windows=(WINDOW, WINDOW - 3), eos_ids=())
    params = dsjax.init(config, jax.random.key(0))
    params["head"]["weight"] *= 4
    return params


def make_prompts():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 97, length).tolist() for length in (50, 37, 1)]
    return [*prompts, prompts[0][:40]]


def assert_likeliest(params, prompts, outputs):
    """Each token is the likeliest by dense attention over the text before it."""
    texts = np.zeros((len(prompts), 50 + NEW_TOKENS), np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        texts[row, : len(prompt) + NEW_TOKENS] = [*prompt, *output]
    logits = np.asarray(dsjax.logits(params, texts))
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        place = len(prompt) - 1
        np.testing.assert_array_equal(output, logits[row, place : place + NEW_TOKENS].argmax(-1))


def test_long_texts_hold_few_pages(windowed):
    """In a pool that would just hold the longest text whole four run at once, and give what dense attention gives."""
    prompts = make_prompts()
    pages = pages_for(50 + NEW_TOKENS - 1, PAGE)
    assert pages < 2 * pages_for(NEW_TOKENS, PAGE)
    out = dsjax.generate(windowed, prompts, max_new_tokens=NEW_TOKENS, page_size=PAGE, token_budget=48, pages=pages)
    assert_likeliest(windowed, prompts, np.asarray(out.tokens[:, 0]))
    assert out.counters.preemptions == 0
    assert out.counters.decode_steps < 2 * NEW_TOKENS, "one after the other they would take twice as many"


def test_layers_that_see_everything_keep_their_pages(windowed):
    """One layer of two has a window: in a pool of 1.4 times what one of them needs the other finds room too."""
    config = dataclasses.replace(windowed.config, windows=(None, WINDOW))
    params, prompts = dsjax.Params(windowed, config), make_prompts()
    of_one = 4 * pages_for(50 + NEW_TOKENS - 1, PAGE)
    options = dict(page_size=PAGE, token_budget=16, pages=of_one * 7 // 5)
    out = dsjax.generate(params, prompts, max_new_tokens=NEW_TOKENS, **options)
    assert_likeliest(params, prompts, np.asarray(out.tokens[:, 0]))
    assert out.counters.preemptions == 0
    assert out.counters.decode_steps < NEW_TOKENS + 10, "all run at once"


@pytest.mark.parametrize(
    ("layers", "pattern", "window", "context", "groups", "share"),
    [
        (24, 2, 128, 8192, (1, 1), 0.54),
        (62, 6, 1024, 131072, (1, 5), 0.19),
        (26, 6, 512, 32768, (1, 6), 0.18),
        (42, 2, 4096, 8192, (1, 1), 0.79),
        (42, 2, 4096, 4096, (1, 0), 1.0),
    ],
    ids=["gpt-oss-20b", "gemma-3-27b", "gemma-3-1b", "gemma-2-9b", "too short to gain"],
)
def test_groups_of_real_models(tiny_config, layers, pattern, window, context, groups, share):
    """Memory of one long sequence, against pages of all layers."""
    windows = tuple(None if layer % pattern == pattern - 1 else window for layer in range(layers))
    config = dataclasses.replace(tiny_config, num_layers=layers, windows=windows, max_context=context)
    made = page_groups(config, context - 1, 64, 512)
    assert (made.windows.count(None), made.windows.count(window)) == groups
    size = 1 + max((buffer for _, buffer in made.places), default=layers - 1)
    for layer, (group, _) in enumerate(made.places):
        assert made.windows[group] == windows[layer]
    assert len(set(made.places)) == len(made.places), "no two layers share a page's buffer"
    columns = pages_for(context - 1, 64)
    assert made.peak(columns) * size / (columns * layers) == pytest.approx(share, abs=0.01)


def test_engine_finds_the_pages_of_windows(windowed):
    """In a pool that long texts pass through many times; the second time prompts are found by their last pages."""
    prompts = make_prompts()
    engine = dsjax.Engine(windowed, page_size=PAGE, slots=2, token_budget=32, max_context=144, pages=24)
    params = dsjax.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    outputs = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
    assert_likeliest(windowed, prompts, outputs)
    text = prompts[2] + outputs[2]
    more = [text[:80], prompts[1], text]
    again = engine.generate(more, dsjax.SamplingParams(max_tokens=10, temperature=0.0))
    assert again[0].outputs[0].token_ids == text[80:90]
    assert again[1].outputs[0].token_ids == outputs[1][:10]
    stats = engine.stats()
    assert stats["prefix_hit_rate"] > 0.4
    assert stats["pages_used"] == 0


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize("max_q_len", [None, 1])
def test_kernels_read_nothing_behind_the_window(implementation, max_q_len, rng):
    """Rows of the table name no page there, and pages that were given back hold anything."""
    q_lens = np.array([1, 9, 1, 0, 20] if max_q_len is None else [1, 1, 1, 0, 1])
    kv_lens, page_size, window = np.array([70, 70, 9, 40, 60]), 16, 23
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    column = np.arange(5)
    table = rng.permutation(25).reshape(5, 5).astype(np.int32)
    unseen = (column + 1) * page_size <= (kv_lens - q_lens - window + 1)[:, None]
    q = jnp.asarray(rng.normal(size=(cu_q_lens[-1] + 2, 4, 16)), jnp.float32)
    pools = [rng.normal(size=(25, 2, page_size, 16)).astype(np.float32) for _ in range(2)]

    def attend(pools, table):
        arrays = [*map(jnp.asarray, (*pools, table, cu_q_lens, kv_lens))]
        return ragged_paged_attention(q, *arrays, window=window, max_q_len=max_q_len, implementation=implementation)

    expected = attend(pools, table)
    assert unseen.any(axis=1).tolist() == [True, True, False, True, True]
    for pool in pools:
        pool[table[unseen]] = np.nan
    np.testing.assert_array_equal(attend(pools, np.where(unseen, 25, table)), expected)
    seen_too = (column + 1) * page_size <= (kv_lens - q_lens - window + 2)[:, None]
    assert (seen_too != unseen).any(), "a page is seen by its last key alone"
    assert (attend(pools, np.where(seen_too, 25, table)) != expected).any()
