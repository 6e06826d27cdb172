"""Signature, checks and choice of backend."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged_paged_attention import reference, xla

BACKENDS = {"reference": reference.attention, "xla": xla.attention}


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    key_pages: Float[Array, "P K p H"],
    value_pages: Float[Array, "P K p H"],
    page_table: Int[Array, "S M"],
    cu_q_lens: Int[Array, "S1"],
    kv_lens: Int[Array, "S"],
    *,
    scale: float | None = None,
    window: int | None = None,
    max_q_len: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of any mix of prompts, chunks of prompts and single tokens.

    The queries of slot `s` are the rows `cu_q_lens[s]:cu_q_lens[s + 1]` and stand at the end of its `kv_lens[s]` keys,
    which must be in the pages already. A slot with no query costs nothing; rows past the last slot's come back zero.
    What a page holds beyond a slot's length is never used, whatever it is.

    Args:
      q: queries, heads grouped by the key head that they share (`N / K` consecutive ones).
      key_pages: pool of key pages.
      value_pages: pool of value pages.
      page_table: pages of each slot in order; entries past its length are ignored and may be out of range.
      cu_q_lens: `int32[S + 1]`, cumulative query counts, from 0.
      kv_lens: keys of each slot, this step's included.
      scale: of the scores, default `1 / sqrt(H)`.
      window: a query sees itself and the `window - 1` keys before it; `None` for all.
      max_q_len: upper bound of queries a slot that the caller promises; 1 leaves out the code for prompts.
      implementation: `"reference"` or `"xla"`; `None` for the best that the platform has.

    Returns:
      Attention output in the dtype of `q`.

    Raises:
      ValueError: the shapes do not fit each other, or the backend is unknown.
    """
    (tokens, heads, head_dim), (slots, _) = q.shape, page_table.shape
    if key_pages.shape != value_pages.shape or key_pages.shape[-1] != head_dim:
        raise ValueError(f"pages {key_pages.shape} and {value_pages.shape} do not fit queries {q.shape}")
    if heads % key_pages.shape[1]:
        raise ValueError(f"{key_pages.shape[1]} key heads do not divide {heads} query heads")
    if cu_q_lens.shape != (slots + 1,) or kv_lens.shape != (slots,):
        raise ValueError(f"{slots} slots need cu_q_lens [{slots + 1}] and kv_lens [{slots}]")
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(f"implementation={implementation!r} is unknown; there are {sorted(BACKENDS)}")
    with jax.named_scope("ragged_paged_attention"):
        return BACKENDS[implementation or "xla"](
            q,
            key_pages,
            value_pages,
            page_table,
            cu_q_lens,
            kv_lens,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window,
            max_q_len=tokens if max_q_len is None else max_q_len,
        )
