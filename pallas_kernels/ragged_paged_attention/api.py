"""Signature, checks and choice of backend."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import quantized

# Modules of this package, best first.
BACKENDS = ("mosaic", "triton", "xla", "reference")

QUERY_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@overload
def ragged_paged_attention(*arrays: Any, return_lse: Literal[False] = False, **options: Any) -> jax.Array: ...
@overload
def ragged_paged_attention(*arrays: Any, return_lse: Literal[True], **options: Any) -> tuple[jax.Array, jax.Array]: ...
def ragged_paged_attention(
    q: Float[Array, "T N H"],
    key_pages: Real[Array, "P K p H"],
    value_pages: Real[Array, "P K p H"],
    page_table: Int[Array | np.ndarray, "S M"],
    cu_q_lens: Int[Array | np.ndarray, "S1"],
    kv_lens: Int[Array | np.ndarray, "S"],
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    key_scales: Float[Array, "P K p"] | None = None,
    value_scales: Float[Array, "P K p"] | None = None,
    kv_starts: Int[Array | np.ndarray, "S"] | None = None,
    max_q_len: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T N H"] | tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of any mix of prompts, chunks of prompts and single tokens, over keys and values in pages.

    The queries of slot `s` are the rows `cu_q_lens[s]:cu_q_lens[s + 1]` and stand at the end of its `kv_lens[s]` keys,
    which must be in the pages already: row `r` has position `kv_lens[s] - cu_q_lens[s + 1] + r`. The key at position
    `j` lies in page `page_table[s, j // p]`, at offset `j % p`. A slot with no query costs nothing, whatever its
    `kv_lens`. What a page holds beyond a slot's length is never used, NaN included. Query head `n` uses key head
    `n // (N // K)`. Softmax and sums are float32.

    The batch is that of DeepSpeed-FastGen (arXiv 2401.08671), the pages are those of vLLM (arXiv 2309.06180).

    Args:
      q: queries, in float32, bfloat16 or float16.
      key_pages: pool of key pages, in the dtype of `q`, or int8, float8_e4m3fn or float8_e5m2 with scales.
      value_pages: pool of value pages, like that of keys.
      page_table: pages of each slot in order; entries past its length, or behind the window of its first query, are
        ignored and may be out of range.
      cu_q_lens: `int32[S + 1]`, cumulative query counts, from 0.
      kv_lens: keys of each slot, this step's included.
      scale: of the products, default `1 / sqrt(H)`.
      window: a query sees itself and the `window - 1` keys before it (after it too if not `causal`); `None` for all.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, as in Gemma 2; before `alibi_slopes`.
      causal: whether a query sees only keys up to its own position; else all that the slot has.
      alibi_slopes: for each query head, what a score gains a position from query to key (arXiv 2108.12409): keys
        behind the query lose.
      sinks: for each query head, one more score of the softmax that has no value, as in gpt-oss.
      key_scales: float32; the keys of a quantized pool are `key_pages * key_scales[..., None]`.
      value_scales: the same for values.
      kv_starts: keys of each slot before this position are not seen; they were dealt with elsewhere.
      max_q_len: upper bound of queries a slot that the caller promises; 1 leaves out the code for prompts.
      return_lse: whether to give the log-sum-exp too.
      implementation: `"mosaic"`, `"triton"`, `"xla"` or `"reference"`; `None` for the best that can run.

    Returns:
      Attention output in the dtype of `q`. With `return_lse` also, in float32, the natural logarithm of the sum of
      `exp(score)` over what each query and head sees, its sink included. A query that sees nothing, as rows past the
      last slot's do, gets 0 and minus infinity (with a sink: 0 and the sink, but for rows past the last slot's).

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or NumPy arrays among the integers hold values out
        of range (arrays on a device are not read).
      UnsupportedError: the backend asked for is unknown or can not run this call; the message gives every reason.
    """
    _check_arrays(q, key_pages, value_pages, key_scales, value_scales)
    _check_batch(q, key_pages, page_table, cu_q_lens, kv_lens, kv_starts, window)
    _check_options(q.shape[1], window, soft_cap, alibi_slopes, sinks, max_q_len)
    integers = (jnp.asarray(x, jnp.int32) for x in (page_table, cu_q_lens, kv_lens))
    arguments = (q, key_pages, value_pages, *integers)
    options = {
        "scale": q.shape[2] ** -0.5 if scale is None else float(scale),
        "window": window,
        "soft_cap": soft_cap,
        "causal": causal,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "kv_starts": None if kv_starts is None else jnp.asarray(kv_starts, jnp.int32),
        "max_q_len": q.shape[0] if max_q_len is None else max_q_len,
    }
    backend = dispatch.select(__name__, BACKENDS, implementation, *arguments, **options)
    with jax.named_scope("ragged_paged_attention"):
        out, lse = backend.attention(*arguments, **options)
    return (out, lse) if return_lse else out


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(f"ragged_paged_attention: {message}")


def _check_arrays(q, key_pages, value_pages, key_scales, value_scales) -> None:
    _require(q.ndim == 3, f"q must be [tokens, heads, head size], not {q.shape}")
    _require(
        key_pages.ndim == 4 and key_pages.shape == value_pages.shape and key_pages.shape[3] == q.shape[2],
        f"key_pages {key_pages.shape} and value_pages {value_pages.shape} must both be"
        f" [pages, key heads, page size, {q.shape[2]}], the last the head size of q {q.shape}",
    )
    heads, kv_heads = q.shape[1], key_pages.shape[1]
    _require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"{kv_heads} key heads do not divide {heads} query heads; each key head serves as many query heads",
    )
    names = [dtype.name for dtype in QUERY_DTYPES]
    _require(q.dtype in QUERY_DTYPES, f"q is {q.dtype}; cast it to one of {', '.join(names)}")
    stored = key_pages.dtype
    _require(
        stored == value_pages.dtype, f"key_pages are {stored} but value_pages {value_pages.dtype}; store both alike"
    )
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    if stored not in quantized.DTYPES:
        names = [dtype.name for dtype in quantized.DTYPES]
        _require(
            stored == q.dtype,
            f"pages are {stored} and q is {q.dtype}; give q in their dtype, or quantize them to {', '.join(names)}",
        )
        given = [name for name, array in scales.items() if array is not None]
        _require(not given, f"{' and '.join(given)} given for {stored} pages; only quantized pages have scales")
        return
    for name, array in scales.items():
        _require(array is not None, f"{stored} pages need {name}, float32 {key_pages.shape[:3]}")
        _require(
            array.shape == key_pages.shape[:3] and array.dtype == jnp.float32,
            f"{name} {array.dtype} {array.shape} must be float32 {key_pages.shape[:3]}, one a page, key head and key",
        )


def _check_batch(q, key_pages, page_table, cu_q_lens, kv_lens, kv_starts, window) -> None:
    _require(page_table.ndim == 2, f"page_table must be [slots, pages a slot], not {page_table.shape}")
    slots, pages_per_slot = page_table.shape
    arrays = {"page_table": page_table, "cu_q_lens": cu_q_lens, "kv_lens": kv_lens, "kv_starts": kv_starts}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, expected in (("cu_q_lens", (slots + 1,)), ("kv_lens", (slots,)), ("kv_starts", (slots,))):
        if name in arrays:
            shape = arrays[name].shape
            _require(shape == expected, f"{slots} slots in page_table need {name} {expected}, not {shape}")
    for name, array in arrays.items():
        _require(jnp.issubdtype(array.dtype, jnp.integer), f"{name} is {array.dtype}; it must hold integers")

    # Values are looked at only where that is free: on the host.
    if isinstance(cu_q_lens, np.ndarray):
        _require(
            cu_q_lens[0] == 0 and (np.diff(cu_q_lens) >= 0).all() and cu_q_lens[-1] <= len(q),
            f"cu_q_lens {cu_q_lens} must begin with 0, never fall, and end within the {len(q)} rows of q",
        )
    if isinstance(kv_lens, np.ndarray) and isinstance(cu_q_lens, np.ndarray):
        page_size = key_pages.shape[2]
        live = np.diff(cu_q_lens) > 0
        _require(
            (kv_lens[live] <= pages_per_slot * page_size).all(),
            f"kv_lens {kv_lens} exceed the {pages_per_slot} pages of {page_size} keys a slot; widen page_table",
        )
        if isinstance(page_table, np.ndarray):
            begin = np.arange(pages_per_slot) * page_size
            used = live[:, None] & (begin < kv_lens[:, None])
            if window is not None:
                used &= begin + page_size > (kv_lens - np.diff(cu_q_lens) - window + 1)[:, None]
            pages = page_table[used]
            _require(
                ((pages >= 0) & (pages < len(key_pages))).all(),
                f"page_table names pages out of range of the {len(key_pages)} in the pool within a slot's length",
            )


def _check_options(heads, window, soft_cap, alibi_slopes, sinks, max_q_len) -> None:
    _require(window is None or window >= 1, f"window={window} must be at least 1, or None for all keys")
    _require(soft_cap is None or soft_cap > 0, f"soft_cap={soft_cap} must be positive, or None for no cap")
    _require(max_q_len is None or max_q_len >= 1, f"max_q_len={max_q_len} must be at least 1, or None if unknown")
    for name, array in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        _require(
            array is None or (array.shape == (heads,) and jnp.issubdtype(array.dtype, jnp.floating)),
            f"{name} must be one floating-point number for each of the {heads} query heads",
        )
