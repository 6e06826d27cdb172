"""The ragged batch: one flat list of tokens that belong to many sequences."""

import dataclasses

import jax

from pallas_kernels.ragged_paged_attention import SharedPrefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """What one forward pass computes: `T` tokens of `S` slots, slot by slot, padding last.

    Prompts, chunks of prompts and single decode tokens are all just counts in `cu_q_lens`. Padding has slot `S`: its
    keys are written nowhere and its rows are never read.
    """

    tokens: jax.Array  # int32[T]
    positions: jax.Array  # int32[T], place in the sequence, from 0
    slot_of_token: jax.Array  # int32[T], S for padding
    cu_q_lens: jax.Array  # int32[S + 1], tokens before each slot's
    kv_lens: jax.Array  # int32[S], keys of each slot once this batch is written
    page_table: jax.Array  # int32[S, G * M], the groups of layers one behind the other
    logit_rows: jax.Array  # int32[R], rows of the batch whose logits are wanted
    final_lens: jax.Array | None = None  # int32[S], how long each sequence may become
    shared: SharedPrefix | None = None  # which slots begin with the same pages, if attention is to use it
