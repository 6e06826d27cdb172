"""What tests of attention share: ragged batches with traps in them, and plain attention on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import api

# Mosaic kernels run on a GPU only; without one they have a suite of their own.
BACKENDS = [name for name in api.BACKENDS if name != "mosaic" or dispatch.current_gpu()]
STATIC = ("scale", "window", "soft_cap", "causal", "max_q_len", "return_lse", "implementation")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(batch, **options):
    """Attention over a batch; skips where Mosaic covers less than the others."""
    try:
        return api.ragged_paged_attention(**batch, **options)
    except dispatch.UnsupportedError as error:
        if options["implementation"] == "mosaic":
            pytest.skip(str(error))
        raise


def make_batch(
    rng,
    shape,
    q_lens,
    kv_lens,
    *,
    page_size=16,
    dtype=np.float32,
    stored=None,
    tokens=None,
    pages_per_slot=None,
    num_pages=None,
    features=(),
):
    """A ragged batch of `shape` (query heads, key heads, head size), as keywords of `ragged_paged_attention`.

    Pages lie in any order. What must not be read is a trap: NaN in queries of padding, in keys, values and scales past
    each context, and page numbers out of range.
    """
    heads, kv_heads, head_dim = shape
    q_lens, kv_lens = np.asarray(q_lens), np.asarray(kv_lens)
    held = np.where(q_lens > 0, kv_lens, 0)
    slots, most = len(q_lens), max(1, -(-int(held.max()) // page_size))
    pages_per_slot = pages_per_slot or most + 1
    num_pages = num_pages or slots * most + 3
    table = np.full((slots, pages_per_slot), num_pages, np.int32)
    owned = np.zeros((num_pages, page_size), bool)
    free = iter(rng.permutation(num_pages))
    for slot, length in enumerate(held):
        for column in range(-(-length // page_size)):
            table[slot, column] = page = next(free)
            owned[page] = np.arange(page_size) < length - column * page_size

    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = rng.normal(size=(tokens or cu_q_lens[-1], heads, head_dim))
    q[cu_q_lens[-1] :] = np.nan
    batch = {"q": jnp.asarray(q, dtype), "page_table": jnp.asarray(table), "cu_q_lens": jnp.asarray(cu_q_lens)}
    batch["kv_lens"] = jnp.asarray(kv_lens, jnp.int32)
    for name in ("key", "value"):
        pool = rng.normal(size=(num_pages, kv_heads, page_size, head_dim))
        if stored is not None:
            scales = rng.uniform(0.5, 1.5, size=pool.shape[:3]) / 32
            batch[f"{name}_scales"] = jnp.asarray(np.where(owned[:, None], scales, np.nan), jnp.float32)
            pool = np.clip(pool * 32, -127, 127)
        if stored == jnp.int8:
            pool = pool.round()
        else:
            pool = np.where(owned[:, None, :, None], pool, np.nan)
        batch[f"{name}_pages"] = jnp.asarray(pool, stored or dtype)
    if "alibi" in features:
        batch["alibi_slopes"] = jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32)
    if "sinks" in features:
        batch["sinks"] = jnp.asarray(rng.normal(size=heads) + 1, jnp.float32)
    if "kv_starts" in features:
        batch["kv_starts"] = jnp.asarray(rng.integers(0, held + 1), jnp.int32)
    return batch


def plain_attention(batch, *, scale=None, window=None, soft_cap=None, causal=True, dtype=None):
    """Dense attention, slot by slot, on the host: output and log-sum-exp.

    In float64; with a `dtype` as plain code in it computes: products, sums and softmax in float32, while keys and
    values once dequantized, the weights of the softmax and the output are rounded to `dtype`.
    """
    precision = np.float64 if dtype is None else np.float32

    def rounded(x):
        return x if dtype is None else x.astype(dtype).astype(precision)

    host = {name: np.asarray(array) for name, array in batch.items()}
    q = host["q"].astype(precision)
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = host["key_pages"].shape[1:3]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf, precision)

    def per_head(name):
        return host[name].astype(precision).reshape(kv_heads, -1, 1, 1)

    for slot, length in enumerate(host["kv_lens"]):
        rows = slice(host["cu_q_lens"][slot], host["cu_q_lens"][slot + 1])
        count = rows.stop - rows.start
        if not count:
            continue
        pages = host["page_table"][slot, : -(-length // page_size)]

        def context(name, pages=pages, length=length):  # [K, 1, length, H]
            pool = host[f"{name}_pages"][pages].astype(precision)
            if f"{name}_scales" in host:
                pool = rounded(pool * host[f"{name}_scales"][pages].astype(precision)[..., None])
            return pool.swapaxes(0, 1).reshape(kv_heads, 1, -1, head_dim)[:, :, :length]

        queries = q[rows].reshape(count, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # [K, G, count, H]
        scores = queries @ context("key").swapaxes(2, 3) * precision(scale or head_dim**-0.5)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        distance = np.arange(length) - np.arange(length - count, length)[:, None]
        if "alibi_slopes" in host:
            scores += per_head("alibi_slopes") * distance.astype(precision)
        visible = distance <= 0 if causal else distance < np.inf
        if window is not None:
            visible &= abs(distance) < window
        if "kv_starts" in host:
            visible &= np.arange(length) >= host["kv_starts"][slot]
        scores = np.where(visible, scores, -np.inf)

        sink = per_head("sinks") if "sinks" in host else precision(-np.inf)
        highest = np.maximum(scores.max(-1, keepdims=True), sink)
        highest = np.where(np.isfinite(highest), highest, precision(0))
        weights = np.exp(scores - highest)
        total = weights.sum(-1, keepdims=True) + np.exp(sink - highest)
        with np.errstate(divide="ignore"):
            part = (np.log(total) + highest)[..., 0]
        weights = rounded(weights / np.where(total > 0, total, 1))
        out[rows] = (weights @ context("value")).transpose(2, 0, 1, 3).reshape(count, heads, head_dim)
        lse[rows] = part.transpose(2, 0, 1).reshape(count, heads)
    return rounded(out), lse


def answers(batch, **options):
    """What `assert_exact` compares with: plain attention in float64, and in the dtype of the batch."""
    return plain_attention(batch, **options), plain_attention(batch, **options, dtype=batch["q"].dtype)


def assert_exact(actual, batch, answers):
    """No further from float64 than 1.1 times what plain attention in the same dtype is; padding zero.

    Both the root mean square and the largest of the errors, with room for chance: another order of sums in float32,
    one rounding that falls to the other side, and luck, which counts where queries are few: all numbers of one query
    and head share the rounding of their weights. `actual` is the output, or output and log-sum-exp.
    """
    dtype, tokens = batch["q"].dtype, int(batch["cu_q_lens"][-1])
    out, lse = actual if isinstance(actual, tuple) else (actual, None)
    (exact, exact_lse), (plain, plain_lse) = answers
    assert out.dtype == dtype
    assert not np.asarray(out)[tokens:].any(), "padding must come back zero"
    if tokens:
        single, ulp = (float(jnp.finfo(each).eps) * abs(exact).max() for each in (np.float32, dtype))
        error, allowed = (np.asarray(x, np.float64)[:tokens] - exact[:tokens] for x in (out, plain))
        luck = 1 + (tokens * exact.shape[1]) ** -0.5
        # Scales of values may be applied to the weights instead: one more rounding, bare where a query sees one key.
        rounding = float(jnp.finfo(dtype).eps) * rms(exact[:tokens]) / 12**0.5 if "value_scales" in batch else 0
        assert rms(error) <= 1.1 * luck * np.hypot(rms(allowed), rounding) + 2 * single
        assert abs(error).max() <= 1.1 * abs(allowed).max() + 64 * single + ulp / 2
    if lse is not None:
        assert lse.dtype == jnp.float32
        sees = np.isfinite(exact_lse)
        np.testing.assert_array_equal(np.isneginf(lse), ~sees)
        single = float(jnp.finfo(np.float32).eps) * abs(exact_lse[sees]).max(initial=1)
        error, allowed = (abs(np.asarray(x, np.float64)[sees] - exact_lse[sees]) for x in (lse, plain_lse))
        assert error.max(initial=0) <= 1.1 * allowed.max(initial=0) + 16 * single


def rms(x):
    """Root of the mean square."""
    return np.sqrt(np.mean(x**2))
