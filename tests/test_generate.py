"""`generate` is a pure function: of the prompt, its settings and its key, and of nothing else."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import dsjax
from dsjax.generation import _generate

PROMPTS = 5
LONGEST, NEW = 40, 12

# What must not matter: (slots, token budget, page size, pages, decode steps between looks). The first is the plain one.
CAPACITIES = [
    {"slots": 15, "token_budget": 200, "page_size": 64, "pages": 15, "steps_per_sync": 1},
    {"slots": 2, "token_budget": 7, "page_size": 16, "pages": 8, "steps_per_sync": 1},
    {"slots": 4, "token_budget": 16, "page_size": 16, "pages": 7, "steps_per_sync": 3},
]


@functools.cache
def compilations():
    """A counter of the backend's compilations."""
    count = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            count.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count


def batch(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, PROMPTS).astype(np.int32)
    return rng.integers(6, 97, (PROMPTS, LONGEST)).astype(np.int32), lengths


def settings(seed):
    rng = np.random.default_rng(seed + 1)
    return {
        "temperature": rng.choice([0.0, 0.5, 1.0], PROMPTS).astype(np.float32),
        "top_k": rng.choice([0, 20], PROMPTS).astype(np.int32),
        "repetition_penalty": rng.choice([1.0, 1.3], PROMPTS).astype(np.float32),
        "limits": rng.integers(1, NEW + 1, PROMPTS).astype(np.int32),
        "stop_ids": rng.integers(6, 97, 5).astype(np.int32),
    }


def same(one, other, rows=slice(None)):
    np.testing.assert_array_equal(one.tokens[rows], other.tokens)
    np.testing.assert_array_equal(one.lengths[rows], other.lengths)
    np.testing.assert_array_equal(one.finish[rows], other.finish)
    np.testing.assert_allclose(one.logprobs[rows], other.logprobs, atol=1e-4)


def test_greedy_is_the_argmax_of_dense_logits(tiny_params):
    tokens, lengths = batch(0)
    out = dsjax.generate(tiny_params, tokens, lengths, max_new_tokens=NEW, ignore_eos=True)
    text = np.zeros((PROMPTS, LONGEST + NEW), np.int32)
    text[:, :LONGEST] = tokens
    rows = np.arange(PROMPTS)
    for step in range(NEW):
        text[rows, lengths + step] = out.tokens[:, 0, step]
    logits = dsjax.logits(tiny_params, text)
    for step in range(NEW):
        np.testing.assert_array_equal(out.tokens[:, 0, step], logits[rows, lengths + step - 1].argmax(-1))


@hypothesis.settings(max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**16), which=st.integers(1, len(CAPACITIES) - 1))
def test_capacities_do_not_matter(seed, which, tiny_params):
    """Slots, budget, chunking, page size, pool and preemption; three samples a prompt and more of them than slots."""
    tokens, lengths = batch(seed)
    run = functools.partial(
        dsjax.generate,
        tiny_params,
        tokens,
        lengths,
        max_new_tokens=NEW,
        n=3,
        key=jax.random.key(seed),
        **settings(seed),
    )
    same(run(**CAPACITIES[0]), run(**CAPACITIES[which]))


@hypothesis.settings(max_examples=20)
@hypothesis.given(seed=st.integers(0, 2**16), row=st.integers(0, PROMPTS - 1))
def test_company_does_not_matter(seed, row, tiny_params):
    """A request alone, under the same key, says what it said among others."""
    tokens, lengths = batch(seed)
    given = settings(seed)
    keys = jax.random.split(jax.random.key(seed), PROMPTS)
    together = dsjax.generate(tiny_params, tokens, lengths, max_new_tokens=NEW, key=keys, n=2, **given)
    mine = {name: value if name == "stop_ids" else value[row : row + 1] for name, value in given.items()}
    picked = slice(row, row + 1)
    alone = dsjax.generate(
        tiny_params, tokens[picked], lengths[picked], max_new_tokens=NEW, key=keys[picked], n=2, **mine
    )
    same(together, alone, picked)


def test_preemption_does_not_matter(tiny_params):
    """A pool that holds hardly more than one sequence: others are put back and computed again."""
    tokens, lengths = np.tile(np.arange(6, 26, dtype=np.int32), (4, 1)), np.full(4, 20, np.int32)
    run = functools.partial(
        dsjax.generate, tiny_params, tokens, lengths, max_new_tokens=40, page_size=8, temperature=0.8, ignore_eos=True
    )
    roomy, tight = run(key=jax.random.key(1)), run(key=jax.random.key(1), pages=16, slots=4)
    assert roomy.counters.preemptions == 0 and tight.counters.preemptions > 0
    same(roomy, tight)


def test_traced_under_a_callers_jit(tiny_params):
    tokens, lengths = batch(3)
    keys = jax.random.key(3)

    @jax.jit
    def rollout(params, tokens, lengths, key, temperature):
        doubled = jax.tree.map(lambda leaf: leaf * 1.0, params)
        return dsjax.generate(doubled, tokens, lengths, max_new_tokens=NEW, key=key, temperature=temperature, n=2)

    inside = rollout(tiny_params, tokens, lengths, keys, 0.7)
    same(inside, dsjax.generate(tiny_params, tokens, lengths, max_new_tokens=NEW, key=keys, temperature=0.7, n=2))


def test_no_new_compilations(tiny_params, tiny_config):
    """New parameters, settings, lengths, keys, stop ids and prompts run the program that is there."""
    run = functools.partial(dsjax.generate, max_new_tokens=NEW, n=2)
    run(tiny_params, [[7] * 20, [8] * 31])
    count, programs = compilations(), _generate._cache_size()
    fresh = jax.block_until_ready(dsjax.init(tiny_config, jax.random.key(9)))
    keys = list(jax.random.split(jax.random.key(5), 2))
    before = len(count)
    for options in (
        {"key": keys[0], "temperature": 0.3, "top_p": 0.9},
        {"key": keys[1], "temperature": [0.0, 1.5], "top_k": 3, "min_p": 0.1, "stop_ids": [9, 10]},
        {"repetition_penalty": 1.2, "ignore_eos": True, "limits": [3, 5]},
    ):
        run(fresh, [[9] * 17, [11] * 5], **options)
    assert _generate._cache_size() == programs
    assert len(count) == before


def test_stop_ids_and_limits(tiny_params, tiny_config):
    free = dsjax.generate(tiny_params, [[9, 8, 7]], max_new_tokens=NEW, ignore_eos=True)
    said = free.tokens[0, 0].tolist()
    stop = next(token for place, token in enumerate(said) if place >= 2 and token not in said[:place])
    place = said.index(stop)
    out = dsjax.generate(tiny_params, [[9, 8, 7]], max_new_tokens=NEW, ignore_eos=True, stop_ids=[stop])
    assert out.lengths[0, 0] == place + 1 and out.finish[0, 0] == dsjax.Finish.STOP
    assert out.tokens[0, 0].tolist() == said[: place + 1] + [0] * (NEW - place - 1)
    by_eos = dataclasses.replace(tiny_config, eos_ids=(stop,))
    own = dsjax.Params(dict(tiny_params), by_eos)
    assert dsjax.generate(own, [[9, 8, 7]], max_new_tokens=NEW).lengths[0, 0] == place + 1
    assert dsjax.generate(own, [[9, 8, 7]], max_new_tokens=NEW, ignore_eos=True).lengths[0, 0] == NEW
    short = dsjax.generate(tiny_params, [[9, 8, 7]], max_new_tokens=NEW, limits=[2], ignore_eos=True)
    assert short.tokens[0, 0].tolist()[:2] == said[:2] and short.lengths[0, 0] == 2
    assert short.finish[0, 0] == dsjax.Finish.LENGTH


def test_the_models_context_ends_a_traced_request(tiny_params):
    """Where lengths are not known in advance, a sequence ends at the model's limit."""
    run = jax.jit(lambda p, t, n: dsjax.generate(p, t, n, max_new_tokens=20, ignore_eos=True))
    out = run(tiny_params, jnp.full((2, 255), 9, jnp.int32), jnp.array([250, 10]))
    assert out.lengths[:, 0].tolist() == [6, 20]
    assert out.finish[0, 0] == dsjax.Finish.LENGTH


def test_samples_differ_and_keys_repeat(tiny_params):
    run = functools.partial(dsjax.generate, tiny_params, [[9, 8, 7]], max_new_tokens=NEW, temperature=1.0, n=4)
    first = run(key=jax.random.key(0))
    assert len({tuple(row) for row in first.tokens[0].tolist()}) == 4
    same(first, run(key=jax.random.key(0)))
    same(first, run(key=jax.random.PRNGKey(0)))
    assert not np.array_equal(first.tokens, run(key=jax.random.key(1)).tokens)


def test_sampling_logprobs(tiny_params):
    tokens, lengths = batch(4)
    out = dsjax.generate(
        tiny_params,
        tokens,
        lengths,
        max_new_tokens=NEW,
        temperature=0.5,
        key=jax.random.key(0),
        ignore_eos=True,
        return_sampling_logprobs=True,
    )
    text = np.concatenate([tokens[0, : lengths[0]], out.tokens[0, 0]])
    logits = dsjax.logits(tiny_params, text[None])[0, lengths[0] - 1 : -1]
    for kept, scale in ((out.logprobs, 1.0), (out.sampling_logprobs, 0.5)):
        expected = jax.nn.log_softmax(logits / scale)[jnp.arange(NEW), out.tokens[0, 0]]
        np.testing.assert_allclose(kept[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, tiny_params):
    """Half-precision trees keep the cache in their own dtype, and log-probabilities in float32 agree roughly."""
    half = dsjax.prepare(tiny_params, dtype=dtype)
    out = dsjax.generate(half, [[9, 8, 7, 6]], max_new_tokens=6)
    text = np.concatenate([[9, 8, 7, 6], out.tokens[0, 0]])
    np.testing.assert_allclose(dsjax.score(tiny_params, text[None])[0, 4:], out.logprobs[0, 0], atol=0.15)


def test_streaming_says_the_same(tiny_params):
    prompt = list(range(6, 60))
    whole = dsjax.generate(tiny_params, [prompt], max_new_tokens=NEW, temperature=0.7, key=jax.random.key(2))
    steps = list(
        dsjax.stream(tiny_params, prompt, max_new_tokens=NEW, temperature=0.7, key=jax.random.key(2), token_budget=16)
    )
    tokens = [token for step in steps for token in step.tokens]
    assert tokens == whole.tokens[0, 0, : whole.lengths[0, 0]].tolist()
    assert [step.prompt_tokens_read for step in steps[:4]] == [16, 32, 48, 54]
    assert steps[-1].finish == whole.finish[0, 0] and all(not step.finish for step in steps[:-1])
    with pytest.raises(dsjax.RequestError, match="follows one sequence"):
        dsjax.stream(tiny_params, prompt, max_new_tokens=NEW, n=2)
