"""Ragged paged attention in Pallas-Triton: every feature, on every NVIDIA GPU from compute capability 8.0 on.

A mixed batch takes two passes, each dense: slots with more than one query go to `triton_prefill`, cut into blocks of
queries; slots with one go to `triton_decode`, cut along their keys.

Block sizes come from `pallas_kernels/tuning/ragged_paged_attention.json` where it has an entry, else from the rules
below. An entry's `shape` has the keys `kind` (`"decode"` or `"prefill"`), `head_dim`, `page_size`, `group` (query heads
a key head), `dtype` and `stored` (names of the dtypes of queries and pages). Its `config` may give any of `keys`,
`num_warps` and `num_stages`, for decode `group_rows` and `programs_per_core`, for prefill `rows`.
"""

import math

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import quantized
from pallas_kernels.ragged_paged_attention import triton_common as common
from pallas_kernels.ragged_paged_attention import triton_decode as decode
from pallas_kernels.ragged_paged_attention import triton_pools as pools
from pallas_kernels.ragged_paged_attention import triton_prefill as prefill

# What kernels are interpreted as; so few cores that tests see parts of several steps.
INTERPRETED = dispatch.Gpu("interpreter", (9, 0), 8)
QUERIES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
PAGE_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256


def refusals(q, key_pages, *_, gpu, **__):
    """Why it can not run a call, in words; see `api.ragged_paged_attention` for the arguments."""
    reasons = dispatch.triton_refusals(gpu)
    if q.dtype not in QUERIES:
        reasons.append(f"queries are {q.dtype}, not one of {', '.join(map(str, QUERIES))}")
    if key_pages.dtype != q.dtype and key_pages.dtype not in quantized.DTYPES:
        names = ", ".join(map(str, quantized.DTYPES))
        reasons.append(f"pages are {key_pages.dtype}, neither {q.dtype} nor one of {names}")
    if q.shape[2] > MAX_HEAD_DIM:
        reasons.append(f"head size {q.shape[2]} is above {MAX_HEAD_DIM}")
    if key_pages.shape[2] not in PAGE_SIZES:
        reasons.append(f"page size {key_pages.shape[2]} is none of {PAGE_SIZES}")
    if gpu and q.dtype == jnp.float32 and key_pages.dtype != q.dtype and q.shape[2] > 128:
        reasons.append("float32 queries over quantized pages of a head size above 128 do not fit in registers")
    if key_pages.dtype in quantized.DTYPES and q.shape[2] % pools.BYTES:
        reasons.append(f"head size {q.shape[2]} is no multiple of {pools.BYTES}, which a word of quantized pages holds")
    return reasons


def attention(
    q,
    key_pages,
    value_pages,
    page_table,
    cu_q_lens,
    kv_lens,
    *,
    scale,
    window,
    soft_cap,
    causal,
    alibi_slopes,
    sinks,
    key_scales,
    value_scales,
    kv_starts,
    max_q_len,
):
    """See `api.ragged_paged_attention`; output and log-sum-exp."""
    gpu = dispatch.current_gpu()
    tokens, heads, _ = q.shape
    slots = page_table.shape[0]
    features = common.Features(scale, soft_cap, gpu.capability if gpu else None, key_pages.dtype)
    arrays = (q, (key_pages, value_pages), (key_scales, value_scales), page_table)
    vectors = (alibi_slopes, sinks)

    if max_q_len == 1:
        plan = decode.plan_of_rows(cu_q_lens, kv_lens, kv_starts, window, tokens)
        config = decode_config(q, key_pages, page_table, window, tokens, gpu)
        return decode.attend(*arrays, plan, *vectors, features, config)

    mask = prefill.Mask(window, causal, kv_starts is not None)
    config = prefill_config(q, key_pages, vectors, mask, gpu)
    plan = prefill.plan_of_blocks(cu_q_lens, kv_lens, kv_starts, tokens, heads // key_pages.shape[1], config.rows)
    chunks = prefill.attend(*arrays, plan, *vectors, features, mask, config)
    plan = decode.plan_of_slots(cu_q_lens, kv_lens, kv_starts, window)
    config = decode_config(q, key_pages, page_table, window, slots, gpu)
    return decode.attend(*arrays, plan, *vectors, features, config, into=chunks)


def _tuned(kind, q, key_pages, gpu):
    shape = {"head_dim": q.shape[2], "page_size": key_pages.shape[2], "group": q.shape[1] // key_pages.shape[1]}
    dtypes = {"dtype": q.dtype.name, "stored": key_pages.dtype.name}
    return dispatch.tuned("ragged_paged_attention", gpu, kind=kind, **shape, **dtypes)


def _has_big_shared_memory(gpu):
    """Data-centre GPUs from Hopper on: 227 KiB a block and tensor cores that read it. Others have 99 KiB or more."""
    return gpu.capability[0] in (9, 10)


def decode_config(q, key_pages, page_table, window, programs, gpu):
    """Block sizes of decode, with `programs` queries to look after."""
    gpu = gpu or INTERPRETED
    (_, heads, head_dim), (_, kv_heads, page_size, _) = q.shape, key_pages.shape
    group, columns, is_quantized = heads // kv_heads, common.padded(head_dim), key_pages.dtype != q.dtype
    # 16 KiB of keys and as much of values a step: with two steps in flight, two or three programs fit in a core.
    keys, num_warps = max(16, min(128, 2**14 // (columns * key_pages.dtype.itemsize))), 4
    group_rows = common.padded(min(group, 64 if _has_big_shared_memory(gpu) else min(64, 2**12 // columns)))
    # What else is smaller is so for want of registers: found by compiling, see the tests.
    if q.dtype == jnp.float32:
        group_rows = 16
        if is_quantized or columns > 64:
            keys, num_warps = 16, 8 if is_quantized else 4
    elif is_quantized:
        keys = min(keys, 2**13 // columns)
    chosen = {
        "keys": keys,
        "group_rows": group_rows,
        "num_warps": num_warps,
        "num_stages": 3,
        "programs_per_core": 2,
    } | _tuned("decode", q, key_pages, gpu)
    wanted = chosen.pop("programs_per_core") * gpu.cores
    programs *= kv_heads * math.ceil(group / chosen["group_rows"])
    longest = page_table.shape[1] * page_size
    if window is not None:
        longest = min(longest, window)
    most = min(math.ceil(longest / chosen["keys"]), 2**14 // columns)
    # Parts cost a merge: a tenth of the programs missing is better than that.
    splits = max(1, min(most, math.ceil(0.9 * wanted / programs)))
    return decode.Config(splits=splits, **chosen)


def prefill_config(q, key_pages, vectors, mask, gpu):
    """Block sizes of prefill, with `vectors` of the query heads if they are not `None`."""
    gpu = gpu or INTERPRETED
    columns, is_quantized = common.padded(q.shape[2]), key_pages.dtype != q.dtype
    rows, keys, num_stages = 128, 64, 3
    # Everything smaller than that is so for want of registers: found by compiling, see the tests.
    if q.dtype == jnp.float32:
        rows, keys, num_stages = (16 if is_quantized else 32), (32 if columns <= 64 and not is_quantized else 16), 2
    elif columns > 128:
        rows, keys, num_stages = (128, 32, 3) if _has_big_shared_memory(gpu) else (64, 32, 2)
    elif not _has_big_shared_memory(gpu):
        is_plain = mask.causal and not mask.has_begin and all(vector is None for vector in vectors)
        is_whole = key_pages.shape[2] >= 64 and columns == q.shape[2]
        keys = 64 if not is_quantized and (columns <= 64 or is_plain and is_whole) else 32
        rows = 64 if is_quantized and columns > 64 else 128
    chosen = {"rows": rows, "keys": keys, "num_warps": 8, "num_stages": num_stages}
    return prefill.Config(**chosen | _tuned("prefill", q, key_pages, gpu))
