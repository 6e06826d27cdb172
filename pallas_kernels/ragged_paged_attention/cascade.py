"""Cascade attention: a prefix that many sequences share is read once for all of them (arXiv 2501.01005).

Decoding reads every key of every sequence, the same page once for each sequence that holds it. Here the queries of
those sequences go over the shared pages together, as if they were one prompt, each then over what is its own, and both
results are merged by their log-sum-exp.
"""

import dataclasses
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Which slots of a step begin with the same pages. Group `g` is led by slot `g`, the lowest of its members.

    With slots 0 and 2 sharing 3 pages of 16, slot 1 alone, and slots 3 and 4 sharing one page:
    `order` 0 2 3 4 1, `rank` 0 4 1 2 3, `cu_group_q_lens` 0 2 2 2 4 4, `prefix_lens` 48 0 0 16 0,
    `kv_starts` 48 0 48 16 16.
    """

    # Not `jax.Array`: functions of trees make such objects of other things too, and tests check annotations.

    order: Any  # int32[S], slots group by group; those that share nothing last
    rank: Any  # int32[S], place of each slot in `order`
    cu_group_q_lens: Any  # int32[S + 1], queries of each group, cumulative; a slot that leads none has 0
    prefix_lens: Any  # int32[S], keys that each group shares
    kv_starts: Any  # int32[S], keys that each slot shares: where its own begin


def shared_prefixes(
    page_table: Int[Array, "S M"], cu_q_lens: Int[Array, "S1"], kv_lens: Int[Array, "S"], page_size: int
) -> SharedPrefix:
    """Find the prefixes that decoding slots share, once a step for all its layers.

    Slots with one query whose first page is the same form a group. It shares the leading pages that all its members
    have in common, but leaves each at least one key of its own. Costs `O(S * (S + M))` and no loop.

    Args:
      page_table: pages of each slot in order, as attention takes them.
      cu_q_lens: `int32[S + 1]`, cumulative query counts.
      kv_lens: keys of each slot, this step's included.
      page_size: keys a page.

    Returns:
      The groups; a batch that shares nothing gives empty ones.
    """
    slots, pages_per_slot = page_table.shape
    index = jnp.arange(slots, dtype=jnp.int32)
    decoding = (jnp.diff(cu_q_lens) == 1) & (kv_lens > 0)
    member = (page_table[:, None, 0] == page_table[None, :, 0]) & decoding[:, None] & decoding  # [S, S]
    leader = jnp.where(decoding, jnp.argmax(member, axis=1), index)

    equal = page_table == page_table[leader]
    common = jnp.min(jnp.where(equal, pages_per_slot, jnp.arange(pages_per_slot)), axis=1)
    common = jnp.minimum(common, (kv_lens - 1) // page_size)
    pages = jnp.min(jnp.where(member, common, pages_per_slot), axis=1)  # the same in all members of a group
    shares = (jnp.sum(member, axis=1) > 1) & (pages > 0)
    kv_starts = jnp.where(shares, pages * page_size, 0).astype(jnp.int32)

    # A stable sort by group as one comparison of all with all.
    group = jnp.where(shares, leader, slots)
    before = (group < group[:, None]) | ((group == group[:, None]) & (index < index[:, None]))
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)

    leads = shares & (leader == index)
    members = jnp.where(leads, jnp.sum(member, axis=1), 0)
    return SharedPrefix(
        order=jnp.zeros(slots, jnp.int32).at[rank].set(index),
        rank=rank,
        cu_group_q_lens=jnp.pad(jnp.cumsum(members), (1, 0)).astype(jnp.int32),
        prefix_lens=jnp.where(leads, kv_starts, 0),
        kv_starts=kv_starts,
    )


@overload
def cascade_attention(*arrays: Any, return_lse: Literal[False] = False, **options: Any) -> jax.Array: ...
@overload
def cascade_attention(*arrays: Any, return_lse: Literal[True], **options: Any) -> tuple[jax.Array, jax.Array]: ...
def cascade_attention(
    q: Float[Array, "T N H"],
    key_pages: Real[Array, "P K p H"],
    value_pages: Real[Array, "P K p H"],
    page_table: Int[Array | np.ndarray, "S M"],
    cu_q_lens: Int[Array | np.ndarray, "S1"],
    kv_lens: Int[Array | np.ndarray, "S"],
    shared: SharedPrefix,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    key_scales: Float[Array, "P K p"] | None = None,
    value_scales: Float[Array, "P K p"] | None = None,
    max_q_len: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T N H"] | tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """What `ragged_paged_attention` gives, reading each shared prefix once.

    Slots with several queries take no part in it and are attended whole. In a 16-bit dtype both parts are rounded to
    it before they are merged in float32.

    Args:
      q: queries; this and all else as in `ragged_paged_attention`.
      key_pages: pool of key pages.
      value_pages: pool of value pages.
      page_table: pages of each slot.
      cu_q_lens: `int32[S + 1]`, cumulative query counts.
      kv_lens: keys of each slot.
      shared: what `shared_prefixes` found in the same batch.
      scale: of the products.
      window: must be `None`.
      soft_cap: of the scores.
      alibi_slopes: must be `None`.
      sinks: for each query head.
      key_scales: of quantized keys.
      value_scales: of quantized values.
      max_q_len: most queries a slot, as in `ragged_paged_attention`.
      return_lse: whether to give the log-sum-exp too.
      implementation: backend of both passes.

    Returns:
      As `ragged_paged_attention`.

    Raises:
      ValueError: `window` or `alibi_slopes` is given: in them a key's weight depends on where each query stands, so
        nothing can be shared; or what `ragged_paged_attention` raises.
    """
    for name, given in (("window", window), ("alibi_slopes", alibi_slopes)):
        if given is not None:
            raise ValueError(f"cascade_attention: {name} can not be shared; call ragged_paged_attention for this layer")
    pools = {"key_scales": key_scales, "value_scales": value_scales, "scale": scale, "soft_cap": soft_cap}
    pools |= {"implementation": implementation, "return_lse": True}

    tokens, slots = q.shape[0], page_table.shape[0]
    with jax.named_scope("shared_prefix"):
        # A decoding slot's query is its first row; other slots come last and are padding here.
        first_row = jnp.minimum(cu_q_lens[:-1], tokens - 1)
        gathered = q[first_row[shared.order]]
        prefix_out, prefix_lse = ragged_paged_attention(
            gathered,
            key_pages,
            value_pages,
            page_table,
            shared.cu_group_q_lens,
            shared.prefix_lens,
            causal=False,
            **pools,
        )
    out, lse = ragged_paged_attention(
        q,
        key_pages,
        value_pages,
        page_table,
        cu_q_lens,
        kv_lens,
        sinks=sinks,
        kv_starts=shared.kv_starts,
        max_q_len=max_q_len,
        **pools,
    )
    with jax.named_scope("merge_prefix"):
        slot = jnp.searchsorted(cu_q_lens[1:], jnp.arange(tokens), side="right", method="compare_all")
        place = shared.rank.at[jnp.minimum(slot, slots - 1)].get(mode="clip")
        shares = (slot < slots) & (shared.kv_starts[jnp.minimum(slot, slots - 1)] > 0)
        prefix_lse = jnp.where(shares[:, None], prefix_lse[place], -jnp.inf)
        merged, merged_lse = merge(out, lse, prefix_out[place], prefix_lse)
    return (merged, merged_lse) if return_lse else merged


def merge(
    out: Float[Array, "T N H"], lse: Float[Array, "T N"], other: Float[Array, "T N H"], other_lse: Float[Array, "T N"]
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention over two disjoint sets of keys from attention over each; either may have seen nothing.

    Args:
      out: attention over the one set.
      lse: its log-sum-exp, minus infinity where nothing was seen.
      other: attention over the other set.
      other_lse: its log-sum-exp.

    Returns:
      Output in the dtype of `out`, and the log-sum-exp of both.
    """
    both = jnp.logaddexp(lse, other_lse)
    finite = jnp.where(jnp.isfinite(both), both, 0)
    mine, theirs = (jnp.exp(x - finite)[..., None] for x in (lse, other_lse))
    merged = mine * out.astype(jnp.float32) + theirs * other.astype(jnp.float32)
    return merged.astype(out.dtype), both
