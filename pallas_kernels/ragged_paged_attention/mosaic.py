"""Ragged paged attention for Hopper: prefill in Pallas-Mosaic-GPU, decode in Pallas-Triton.

A mixed batch takes two passes, each dense: slots with more than one query go to `mosaic_prefill`; slots with one go to
`triton_decode`, which is bound by memory and gains nothing from what only Hopper has.
"""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.compat import mosaic
from pallas_kernels.ragged_paged_attention import mosaic_prefill, triton
from pallas_kernels.ragged_paged_attention import triton_common as common
from pallas_kernels.ragged_paged_attention import triton_decode as decode

HOPPER = 9  # `wgmma` came with it and did not stay
DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16)))


def refusals(q, key_pages, *arguments, scale, alibi_slopes, max_q_len, gpu, **options):
    """Why it can not run a call, in words; see `api.ragged_paged_attention` for the arguments."""
    if gpu is None:
        return ["there is no GPU to compile for, and Mosaic kernels are not interpreted"]
    reasons = triton.refusals(q, key_pages, *arguments, scale=scale, max_q_len=max_q_len, gpu=gpu, **options)
    if gpu.capability[0] != HOPPER:
        major, minor = gpu.capability
        reasons.append(f"{gpu.kind} has compute capability {major}.{minor}, the kernel needs `wgmma` of 9.0")
    if q.dtype not in DTYPES:
        reasons.append(f"queries are {q.dtype}, not one of {', '.join(map(str, DTYPES))}")
    if key_pages.dtype != q.dtype:
        reasons.append(f"pages are {key_pages.dtype}, not {q.dtype} as the queries")
    if q.shape[2] not in mosaic_prefill.HEAD_DIMS:
        reasons.append(f"head size {q.shape[2]} is none of {mosaic_prefill.HEAD_DIMS}")
    if alibi_slopes is not None:
        reasons.append("it has no ALiBi")
    if scale <= 0:
        reasons.append(f"scale {scale} is not positive")
    if max_q_len == 1:
        reasons.append("max_q_len is 1: there is nothing but decode, which is Triton's")
    if not reasons:
        try:
            mosaic()
        except ImportError as error:
            reasons.append(f"Pallas-Mosaic-GPU can not be imported: {error}")
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
    del max_q_len
    chunks = mosaic_prefill.prefill(
        q,
        key_pages,
        value_pages,
        page_table,
        cu_q_lens,
        kv_lens,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        causal=causal,
        sinks=sinks,
        kv_starts=kv_starts,
    )
    gpu = dispatch.current_gpu()
    features = common.Features(scale, soft_cap, gpu.capability if gpu else None, key_pages.dtype)
    arrays = (q, (key_pages, value_pages), (key_scales, value_scales), page_table)
    plan = decode.plan_of_slots(cu_q_lens, kv_lens, kv_starts, window)
    config = triton.decode_config(q, key_pages, page_table, window, page_table.shape[0], gpu)
    return decode.attend(*arrays, plan, alibi_slopes, sinks, features, config, into=chunks)
