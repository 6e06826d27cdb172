"""Rotary and page write in plain XLA operations: scatters that update donated pages in place."""

import jax.numpy as jnp

from pallas_kernels.rotary_page_write.reference import prepare, quantize


def rotary_page_write(
    qkv,
    key_pages,
    value_pages,
    page,
    offset,
    *,
    cos,
    sin,
    interleaved,
    q_norm,
    k_norm,
    norm_eps,
    norm_offset,
    key_scales,
    value_scales,
    q_dtype,
):
    """See `api.rotary_page_write`."""
    num_pages, kv_heads = key_pages.shape[:2]
    q, k, v = prepare(qkv, kv_heads, cos, sin, interleaved, q_norm, k_norm, norm_eps, norm_offset, q_dtype)

    # Rows of H scattered along all axes before H: XLA transposes the whole pool for others, and gathers a pool whose
    # heads are spread over devices if it is seen as flat rows.
    is_real = (page >= 0) & (page < num_pages)
    # Padding goes past the end, to pages all different, so that the places are unique as the scatter is promised.
    page = jnp.where(is_real, page, num_pages + jnp.arange(page.shape[0], dtype=page.dtype))
    place = page[:, None], jnp.arange(kv_heads), offset[:, None]

    def put(buffer, rows):
        return buffer.at[place].set(rows.astype(buffer.dtype), mode="drop", unique_indices=True)

    def write(pages, scales, rows):
        if scales is not None:
            rows, row_scales = quantize(rows, pages.dtype)
            scales = put(scales, row_scales)
        return put(pages, rows), scales

    key_pages, key_scales = write(key_pages, key_scales, k)
    value_pages, value_scales = write(value_pages, value_scales, v)
    return q, key_pages, value_pages, key_scales, value_scales
