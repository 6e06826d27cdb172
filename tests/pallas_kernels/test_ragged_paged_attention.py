"""Every backend of ragged paged attention against float64 on the host."""

import functools
import inspect
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BACKENDS, answers, assert_exact, make_batch, run
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.shapes import DEEPSPEED, DEEPSPEED_TOLERANCES

LEVELS = {
    "heads": [(2, 2), (6, 2), (7, 1), (16, 2), (71, 1)],
    "head_dim": [64, 80, 96, 256],
    "page_size": [16, 32, 64, 128],
    "stored": [None, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2],
    "dtype": [jnp.float32, jnp.bfloat16, jnp.float16],
    "window": [None, 33],
    "soft_cap": [None, 2.0],
    "scale": [None, 0.2],
    "causal": [True, False],
    "return_lse": [True, False],
    "alibi": [False, True],
    "sinks": [False, True],
    "kv_starts": [False, True],
    "max_q_len": [None, 1],
}


def pairwise(levels):
    """Few choices of one level a factor that hold every pair of levels of two factors: a greedy cover."""
    names = list(levels)
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(levels[a])), range(len(levels[b])))
    }
    while missing:
        chosen = dict(min(missing, key=sorted))
        for name in names:
            if name not in chosen:
                gains = [
                    sum(frozenset([(name, i), other]) in missing for other in chosen.items())
                    for i in range(len(levels[name]))
                ]
                chosen[name] = gains.index(max(gains))
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        yield {name: levels[name][chosen[name]] for name in names}


COVER = list(pairwise(LEVELS))
SLOTS, MOST_NEW, CONTEXT = 4, 20, 160


def test_cover_holds_every_pair():
    for a, b in itertools.combinations(LEVELS, 2):
        held = {(str(chosen[a]), str(chosen[b])) for chosen in COVER}
        assert len(held) == len(LEVELS[a]) * len(LEVELS[b]), (a, b)


@functools.lru_cache(maxsize=8)  # backends are tested one after the other on the same examples
def featured_example(index, slots, seed):
    chosen = COVER[index]
    q_lens = np.minimum([new for new, _ in slots], chosen["max_q_len"] or MOST_NEW)
    kv_lens = q_lens + np.minimum([seen for _, seen in slots], CONTEXT - q_lens)
    pages_per_slot = -(-CONTEXT // chosen["page_size"]) + 1
    batch = make_batch(
        np.random.default_rng(seed),
        (*chosen["heads"], chosen["head_dim"]),
        q_lens,
        kv_lens,
        page_size=chosen["page_size"],
        dtype=chosen["dtype"],
        stored=chosen["stored"],
        tokens=SLOTS * MOST_NEW + 4,
        pages_per_slot=pages_per_slot,
        num_pages=SLOTS * pages_per_slot,
        features=[name for name in ("alibi", "sinks", "kv_starts") if chosen[name]],
    )
    options = {name: chosen[name] for name in ("scale", "window", "soft_cap", "causal")}
    return batch, options, answers(batch, **options)


slot_lengths = st.tuples(st.sampled_from([0, 1, 1, 7]) | st.integers(0, MOST_NEW), st.integers(0, CONTEXT))


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("index", range(len(COVER)))
@hypothesis.settings(max_examples=5)
@hypothesis.given(slots=st.tuples(*[slot_lengths] * SLOTS), seed=st.integers(0, 2**16))
def test_features_in_pairs(implementation, index, slots, seed):
    """Any mix of query counts and histories, in programs that together hold every pair of features."""
    batch, options, expected = featured_example(index, slots, seed)
    hypothesis.note(COVER[index])
    also = {name: COVER[index][name] for name in ("max_q_len", "return_lse")}
    assert_exact(run(batch, **options, **also, implementation=implementation), batch, expected)


# Batches of about one size share one compiled program.
TOKENS, TABLE_WIDTHS = (256, 768, 1280, 2048), (2, 8, 16)
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]


@functools.lru_cache(maxsize=2)
def deepspeed_example(name, dtype):
    shape = DEEPSPEED[name]
    heads, kv_heads, head_dim = shape.attention.heads, shape.attention.kv_heads, shape.attention.head_dim
    # Few heads, in the same ratio: they are independent of each other, and a CPU is slow.
    fewer = kv_heads // 2 if kv_heads > 8 else kv_heads
    width = -(-max(shape.kv_lens) // shape.page_size)
    batch = make_batch(
        np.random.default_rng(len(name)),
        (heads // fewer, kv_heads // fewer, head_dim),
        shape.q_lens + [0] * (-len(shape.q_lens) % 5),
        shape.kv_lens + [0] * (-len(shape.q_lens) % 5),
        page_size=shape.page_size,
        dtype=dtype,
        tokens=next(size for size in TOKENS if size >= sum(shape.q_lens)),
        pages_per_slot=next(size for size in (2, 8, 16) if size >= width),
        num_pages=80,
    )
    return batch, answers(batch, scale=shape.scale)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_batches(implementation, name):
    """The batches of the original's own suite within its tolerances, each in one of its dtypes by turns."""
    dtype = DTYPES[list(DEEPSPEED).index(name) % len(DTYPES)]
    batch, expected = deepspeed_example(name, dtype)
    out = run(batch, scale=DEEPSPEED[name].scale, implementation=implementation)
    assert_exact(out, batch, expected)
    relative, absolute = DEEPSPEED_TOLERANCES[jnp.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0][0], relative, absolute)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_decode_of_many_slots(implementation, rng):
    """Lengths round the edges of pages and of blocks of pages; slots that are empty hold any length."""
    kv_lens = [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513, 10**9, 600, 10**9]
    q_lens = [int(length < 10**9) for length in kv_lens]
    batch = make_batch(rng, (4, 2, 16), q_lens, kv_lens, tokens=16)
    actual = run(batch, max_q_len=1, return_lse=True, implementation=implementation)
    assert_exact(actual, batch, answers(batch))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_encoder_with_windows(implementation, rng):
    """Whole texts, longer than a block of queries, each of which sees as far ahead as back."""
    batch = make_batch(rng, (2, 2, 16), [300, 0, 140], [300, 0, 140])
    options = {"window": 40, "causal": False}
    assert_exact(run(batch, **options, implementation=implementation), batch, answers(batch, **options))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_nothing_to_see(implementation, rng):
    """A query that sees no key gives 0, and of its scores only the sink remains; padding has no sink."""
    batch = make_batch(rng, (4, 2, 16), [1, 3, 0, 1], [20, 30, 0, 40], tokens=8, features=["sinks"])
    batch["kv_starts"] = batch["kv_lens"].at[3].set(0)
    out, lse = run(batch, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(out[:4], 0)
    np.testing.assert_allclose(lse[:4], np.broadcast_to(batch["sinks"], (4, 4)), rtol=1e-6)
    assert np.abs(out[4]).min() > 0
    np.testing.assert_array_equal(lse[5:], -np.inf)
    del batch["sinks"]
    out, lse = run(batch, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(out[:4], 0)
    np.testing.assert_array_equal(np.isneginf(lse).all(1), [True] * 4 + [False] + [True] * 3)


def test_best_backend_of_a_cpu(rng, monkeypatch):
    batch = make_batch(rng, (4, 2, 16), [1, 3], [20, 30])
    by_xla = run(batch, implementation="xla")
    np.testing.assert_array_equal(jax.jit(ragged_paged_attention)(**batch), by_xla)
    monkeypatch.setenv("PALLAS_KERNELS", "ragged_paged_attention=reference")
    by_reference = jax.jit(lambda batch: ragged_paged_attention(**batch))(batch)
    np.testing.assert_array_equal(by_reference, run(batch, implementation="reference"))
    assert (by_reference != by_xla).any(), "both would be the same code"


def test_refusals(rng):
    attention = inspect.unwrap(ragged_paged_attention)  # as users have it: without the tests' own shape checks
    batch = make_batch(rng, (4, 2, 16), [1], [5])
    pages, scales = batch["key_pages"], jnp.ones(batch["key_pages"].shape[:3])
    int8 = {"key_pages": pages.astype(jnp.int8), "value_pages": pages.astype(jnp.int8)}
    for changed, message in (
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; there are .*'reference'.*'xla'"),
        ({"q": batch["q"][:, :3]}, "2 key heads do not divide 3 query heads"),
        ({"q": batch["q"][..., :8]}, r"must both be \[pages, key heads, page size, 8\]"),
        ({"q": batch["q"][0]}, r"q must be \[tokens, heads, head size\]"),
        ({"value_pages": pages[:2]}, "key_pages .* and value_pages .* must both be"),
        ({"q": batch["q"].astype(jnp.int32)}, "q is int32; cast it to one of float32, bfloat16, float16"),
        ({"value_pages": int8["value_pages"]}, "key_pages are float32 but value_pages int8; store both alike"),
        ({"q": batch["q"].astype(jnp.bfloat16)}, "pages are float32 and q is bfloat16; give q in their dtype"),
        ({"key_scales": scales, "value_scales": scales}, "key_scales and value_scales given for float32 pages"),
        (int8, r"int8 pages need key_scales, float32 \(\d, 2, 16\)"),
        (int8 | {"key_scales": scales}, "int8 pages need value_scales"),
        (int8 | {"key_scales": scales[..., :1], "value_scales": scales}, "key_scales float32 .* must be float32"),
        (int8 | {"key_scales": scales, "value_scales": scales.astype(jnp.bfloat16)}, "value_scales bfloat16"),
        ({"page_table": batch["page_table"][0]}, r"page_table must be \[slots, pages a slot\]"),
        ({"kv_lens": jnp.zeros(2, jnp.int32)}, r"1 slots in page_table need kv_lens \(1,\), not \(2,\)"),
        ({"cu_q_lens": jnp.zeros(1, jnp.int32)}, r"1 slots in page_table need cu_q_lens \(2,\), not \(1,\)"),
        ({"kv_starts": jnp.zeros(2, jnp.int32)}, r"need kv_starts \(1,\), not \(2,\)"),
        ({"kv_lens": jnp.zeros(1)}, "kv_lens is float32; it must hold integers"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"max_q_len": 0}, "max_q_len=0 must be at least 1"),
        ({"sinks": jnp.zeros(2)}, "sinks must be one floating-point number for each of the 4 query heads"),
        ({"alibi_slopes": jnp.zeros(4, jnp.int32)}, "alibi_slopes must be one floating-point number"),
        ({"cu_q_lens": np.array([0, 2])}, "cu_q_lens .* end within the 1 rows of q"),
        ({"cu_q_lens": np.array([1, 1])}, "cu_q_lens .* must begin with 0"),
        ({"cu_q_lens": np.array([0, 1]), "kv_lens": np.array([33])}, "exceed the 2 pages of 16 keys a slot"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**(batch | changed))


def test_values_of_numpy_arrays_are_checked(rng):
    batch = make_batch(rng, (4, 2, 16), [1, 0], [5, 9], page_size=4)
    host = {name: np.array(batch[name]) for name in ("page_table", "cu_q_lens", "kv_lens")}
    expected = run(batch, implementation="reference")
    np.testing.assert_array_equal(ragged_paged_attention(**(batch | host), implementation="reference"), expected)
    host["page_table"][0, 0] = len(batch["key_pages"])
    with pytest.raises(ValueError, match="page_table names pages out of range of the 7 in the pool"):
        ragged_paged_attention(**(batch | host))
    behind = {"window": 1, "implementation": "reference"}  # of the last query only the last key is seen
    np.testing.assert_array_equal(ragged_paged_attention(**(batch | host), **behind), run(batch, **behind))
