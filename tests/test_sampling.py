"""Sampling against numpy and transformers' own processors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.ragged.state import Sampling
from dsjax.sampling import keep, penalize, sample

VOCAB = 64


def settings(slots, **given) -> Sampling:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    values = {
        name: jnp.broadcast_to(
            jnp.asarray(given.pop(name, value), jnp.int32 if name == "top_k" else jnp.float32), slots
        )
        for name, value in neutral.items()
    }
    return Sampling(**values, logit_bias=given.pop("logit_bias", None), **given)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.fixture
def logits(rng):
    return jnp.asarray(rng.normal(size=(16, VOCAB)) * 3, jnp.float32)


@pytest.mark.parametrize(
    "name,values", [("top_k", (1, 5, 63, 64, 1000)), ("top_p", (0.01, 0.5, 0.95)), ("min_p", (0.01, 0.3, 1.0))]
)
def test_filters_equal_transformers(name, values, logits):
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warper = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}[name]
    for value in values:
        expected = torch.isfinite(warper(value)(None, torch.tensor(np.asarray(logits))))
        np.testing.assert_array_equal(keep(logits, settings(16, **{name: value})), expected.numpy())


def test_filters_follow_each_other(logits):
    """Top-p counts the mass that top-k left, as in transformers' order of processors."""
    import torch
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chain = LogitsProcessorList([TopKLogitsWarper(10), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)])
    expected = torch.isfinite(chain(None, torch.tensor(np.asarray(logits))))
    both = settings(16, top_k=10, top_p=0.7, min_p=0.1)
    np.testing.assert_array_equal(keep(logits, both), expected.numpy())
    assert not np.array_equal(keep(logits, settings(16, top_p=0.7, min_p=0.1)), expected.numpy())


def test_ties_are_kept_together():
    tied = jnp.zeros((1, VOCAB)).at[0, :3].set(2.0)
    assert keep(tied, settings(1, top_k=2)).sum() == 3
    assert keep(tied, settings(1, top_p=0.0)).sum() == 3, "at least the likeliest tokens stay"


def test_repetition_penalty_equals_transformers(logits, rng):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    history = rng.integers(0, VOCAB, (16, 9))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(history), torch.tensor(np.asarray(logits)))
    padded = jnp.pad(jnp.asarray(history), ((0, 0), (0, 3)), constant_values=VOCAB)
    np.testing.assert_allclose(penalize(logits, padded, jnp.full(16, 1.7)), expected.numpy(), rtol=1e-6)


def test_greedy_takes_the_highest_after_bias_and_penalty(logits):
    top = jnp.argmax(logits, -1)
    bias = jnp.zeros((16, VOCAB)).at[:, 7].set(1e3)
    for given, expected in (({}, top), ({"logit_bias": bias}, jnp.full(16, 7))):
        token, logprob, _ = sample(logits, settings(16, temperature=0.0, **given), keys(16))
        np.testing.assert_array_equal(token, expected)
        own = jax.nn.log_softmax(logits)[jnp.arange(16), token]
        np.testing.assert_allclose(logprob, own, atol=1e-5, err_msg="log-probabilities are of the unmodified logits")
    token, _, _ = sample(logits, settings(16, temperature=0.0, repetition_penalty=1e6), keys(16), lambda: top[:, None])
    assert (token != top).all()


def test_frequencies_follow_the_distribution():
    """Chi-square of 20,000 draws at a temperature with a filter, and rows that differ in settings do not disturb."""
    draws = 20_000
    row = jnp.asarray(np.random.default_rng(1).normal(size=12), jnp.float32)
    half = settings(draws, temperature=jnp.where(jnp.arange(draws) % 2 == 0, 0.7, 0.0), top_k=8)
    token, _, used = sample(jnp.broadcast_to(row, (draws, 12)), half, keys(draws), with_distribution=True)
    np.testing.assert_array_equal(token[1::2], jnp.argmax(row))
    assert not used[1::2].any(), "greedy decoding is certain"
    kept = jnp.where(row >= jnp.sort(row)[-8], row / 0.7, -jnp.inf)
    probability = np.asarray(jax.nn.softmax(kept), np.float64)
    counts = np.bincount(np.asarray(token[::2]), minlength=12)
    assert counts[probability == 0].sum() == 0
    expected = probability * draws / 2
    chi_square = np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])
    assert chi_square < 24.3, "7 degrees of freedom: larger once in a thousand seeds"
    np.testing.assert_allclose(used[::2], jax.nn.log_softmax(kept)[token[::2]], atol=1e-5)


def test_a_draw_depends_on_its_own_row_only(logits):
    chosen = settings(16, temperature=0.9, top_p=0.9)
    together, _, _ = sample(logits, chosen, keys(16))
    for rows in (slice(3, 4), slice(8, 16)):
        alone, _, _ = sample(logits[rows], jax.tree.map(lambda x, rows=rows: x[rows], chosen), keys(16)[rows])
        np.testing.assert_array_equal(alone, together[rows])


def test_neutral_settings_change_nothing(logits):
    neutral = settings(16)
    filtered = dataclasses.replace(neutral, top_k=jnp.full(16, VOCAB), min_p=jnp.full(16, 1e-30))
    np.testing.assert_array_equal(sample(logits, neutral, keys(16))[0], sample(logits, filtered, keys(16))[0])
