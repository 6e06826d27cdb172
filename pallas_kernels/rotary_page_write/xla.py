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
    num_pages, kv_heads, page_size, _ = key_pages.shape
    q, k, v = prepare(qkv, kv_heads, cos, sin, interleaved, q_norm, k_norm, norm_eps, norm_offset, q_dtype)

    # The pool seen as rows of H and scattered along the leading axis: XLA transposes the whole pool for any other.
    num_rows = num_pages * kv_heads * page_size
    is_real = (page >= 0) & (page < num_pages)
    row = (jnp.where(is_real, page, 0)[:, None] * kv_heads + jnp.arange(kv_heads)) * page_size + offset[:, None]
    # Padding goes past the end, to places all different, so that the rows are unique as the scatter is promised.
    past = num_rows + jnp.arange(row.size).reshape(row.shape)
    row = jnp.where(is_real[:, None], row, past).reshape(-1)

    def put(buffer, rows):
        flat = buffer.reshape(num_rows, *rows.shape[2:])
        rows = rows.reshape(-1, *rows.shape[2:]).astype(buffer.dtype)
        return flat.at[row].set(rows, mode="drop", unique_indices=True).reshape(buffer.shape)

    def write(pages, scales, rows):
        if scales is not None:
            rows, row_scales = quantize(rows, pages.dtype)
            scales = put(scales, row_scales)
        return put(pages, rows), scales

    key_pages, key_scales = write(key_pages, key_scales, k)
    value_pages, value_scales = write(value_pages, value_scales, v)
    return q, key_pages, value_pages, key_scales, value_scales
