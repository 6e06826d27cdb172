"""Which queries each program of a prefill kernel works on, computed on the device with nothing known on the host."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def num_query_blocks(rows: int, slots: int, block: int) -> int:
    """Most blocks that `slots` runs of together `rows` rows can be cut into."""
    return (rows + slots * (block - 1)) // block


def query_blocks(
    q_lens: Int[Array, "S"], block: int, num_blocks: int
) -> tuple[Int[Array, "num_blocks"], Int[Array, "num_blocks"]]:
    """Cut the rows of every slot into blocks, a slot after the other.

    With `q_lens = [3, 0, 5]` and `block = 2` the blocks of six programs, one more than are needed, are
    `slot = [0, 0, 2, 2, 2, 3]` and `start = [0, 2, 0, 2, 4, 0]`.

    Args:
      q_lens: rows of each slot, 0 for those that no block is wanted of.
      block: rows of a block; the last one of a slot may have fewer.
      num_blocks: how many there is room for; `num_query_blocks` are enough for any batch.

    Returns:
      Of each block its slot, `S` if it is not used, and the first of its rows, counted from the slot's first.
    """
    slots = q_lens.shape[0]
    counts = (q_lens + block - 1) // block
    # Sums over masks instead of a cumulative sum and a search: they fuse into one small kernel.
    ends = jnp.sum(jnp.where(jnp.tri(slots, dtype=bool), counts, 0), axis=1, dtype=jnp.int32)
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    slot = jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32)
    first = (ends - counts).at[slot].get(mode="fill", fill_value=0)
    return slot, jnp.where(slot < slots, (index - first) * block, 0)
