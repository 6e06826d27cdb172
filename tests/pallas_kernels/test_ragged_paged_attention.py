"""Every backend of ragged paged attention against float64 on the host."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.api import BACKENDS

# (query heads, key heads, head size, page size): ratios 1, 3, 7, 8 and odd head sizes.
SHAPES = [(2, 2, 16, 16), (9, 3, 64, 64), (7, 1, 80, 16), (16, 2, 96, 32), (8, 1, 128, 128)]
TOLERANCE = {np.float32: (5e-4, 5e-5), jnp.bfloat16: (4.8e-1, 3.2e-2)}  # (relative, absolute), DeepSpeed's own suite


def make_batch(rng, heads, kv_heads, head_dim, page_size, q_lens, kv_lens, padding=0, dtype=np.float32):
    """A ragged batch; what lies in the pages past each context is NaN, so a read of it shows."""
    slots, pages_per_slot = len(q_lens), max(1, -(-max(kv_lens) // page_size)) + 1
    num_pages = slots * pages_per_slot + 3
    table = rng.permutation(num_pages)[: slots * pages_per_slot].reshape(slots, pages_per_slot).astype(np.int32)
    pools = rng.normal(size=(2, num_pages, kv_heads, page_size, head_dim)).astype(np.float32)
    owned = np.zeros((num_pages, page_size), bool)
    for slot, length in enumerate(kv_lens):
        position = np.arange(length)
        owned[table[slot, position // page_size], position % page_size] = True
        table[slot, -(-length // page_size) :] = num_pages  # out of range past the end
    pools = np.where(owned[None, :, None, :, None], pools, np.nan)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = rng.normal(size=(cu_q_lens[-1] + padding, heads, head_dim)).astype(np.float32)
    arrays = [jnp.asarray(x, dtype) for x in (q, *pools)]
    return *arrays, jnp.asarray(table), jnp.asarray(cu_q_lens), jnp.asarray(kv_lens, jnp.int32)


def float64_attention(q, keys, values, table, cu_q_lens, kv_lens, window=None, scale=None):
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out = np.zeros(q.shape)
    page_size, group = keys.shape[2], q.shape[1] // keys.shape[1]
    for slot, length in enumerate(np.asarray(kv_lens)):
        begin, end = int(cu_q_lens[slot]), int(cu_q_lens[slot + 1])
        places = np.arange(length)
        page, offset = np.asarray(table)[slot, places // page_size], places % page_size
        k, v = (np.repeat(pool[page, :, offset], group, axis=1) for pool in (keys, values))
        for row in range(begin, end):
            position = length - (end - row)
            first = 0 if window is None else max(0, position - window + 1)
            scores = np.einsum("nh,tnh->nt", q[row], k[first : position + 1]) * (scale or q.shape[-1] ** -0.5)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row] = np.einsum("nt,tnh->nh", weights / weights.sum(-1, keepdims=True), v[first : position + 1])
    return out


@functools.partial(jax.jit, static_argnames=("window", "max_q_len", "implementation", "scale"))
def run(*arrays, **options):
    return ragged_paged_attention(*arrays, **options)


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_batch(implementation, dtype, shape, rng):
    """Prompts, chunks with history, single tokens, an empty slot and padding in one batch."""
    q_lens, kv_lens = [1, 0, 37, 1, 133, 2], [290, 0, 37, 1, 150, 64]
    for window in (None, 33):
        arrays = make_batch(rng, *shape, q_lens, kv_lens, padding=9, dtype=dtype)
        out = np.asarray(run(*arrays, window=window, implementation=implementation), np.float64)
        expected = float64_attention(*arrays, window=window)
        relative, absolute = TOLERANCE[dtype]
        np.testing.assert_allclose(out, expected, rtol=relative, atol=absolute)
        assert not out[sum(q_lens) :].any(), "padding must come back zero"


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_decode_only(implementation, rng):
    arrays = make_batch(rng, 9, 3, 64, 64, [1, 1, 0, 1], [1, 200, 0, 64])
    out = run(*arrays, max_q_len=1, scale=0.3, implementation=implementation)
    np.testing.assert_allclose(out, float64_attention(*arrays, scale=0.3), rtol=5e-4, atol=5e-5)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    slots=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=4, max_size=4),
    window=st.sampled_from([None, 7]),
    seed=st.integers(0, 2**16),
)
def test_any_ragged_batch(slots, window, seed):
    """Any mix of query counts and histories, one compiled shape."""
    rng = np.random.default_rng(seed)
    q_lens, history = zip(*slots, strict=True)
    kv_lens = [new + old if new else 0 for new, old in slots]
    arrays = list(
        make_batch(rng, 4, 2, 16, 16, q_lens, [*kv_lens[:-1], max(kv_lens[-1], 1)], padding=160 - sum(q_lens))
    )
    arrays[3] = jnp.pad(arrays[3], ((0, 0), (0, 8 - arrays[3].shape[1])), constant_values=10_000)
    pool = 40 - arrays[1].shape[0]
    arrays[1:3] = (jnp.pad(x, ((0, pool), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan) for x in arrays[1:3])
    out = run(*arrays, window=window, implementation="xla")
    np.testing.assert_allclose(out, float64_attention(*arrays, window=window), rtol=5e-4, atol=5e-5)


def test_refusals(rng):
    attention = inspect.unwrap(ragged_paged_attention)  # as users have it: without the tests' own shape checks
    arrays = make_batch(rng, 4, 2, 16, 16, [1], [5])
    for changed, options, message in (
        (arrays, {"implementation": "cuda"}, "implementation='cuda' is unknown"),
        ((arrays[0][:, :3], *arrays[1:]), {}, "2 key heads do not divide 3 query heads"),
        ((arrays[0][..., :8], *arrays[1:]), {}, "do not fit queries"),
        ((*arrays[:-1], jnp.zeros(2, jnp.int32)), {}, "1 slots need"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*changed, **options)
