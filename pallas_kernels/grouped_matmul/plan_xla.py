"""The plan in plain XLA operations: a sort, and counts by comparison."""

import jax.numpy as jnp


def plan(chosen, num_experts, num_blocks, block_rows):
    """Order and blocks of `plan.Plan`.

    Args:
      chosen: `int32[P]`, expert of each pair, or any number that is none of them.
      num_experts: how many there are.
      num_blocks: of the result.
      block_rows: most rows of a block.
    """
    pairs, groups = chosen.shape[0], num_experts + 1  # the last of those without an expert
    experts = jnp.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen)
    # Keys that differ: any sort of them is stable, and of one array.
    order = jnp.sort(experts * pairs + jnp.arange(pairs, dtype=jnp.int32)) % pairs
    index = jnp.arange(groups, dtype=jnp.int32)
    sizes = jnp.sum(experts == index[:, None], axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // block_rows)
    last = jnp.cumsum(blocks)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(block[:, None] >= last, axis=1, dtype=jnp.int32), groups - 1)
    first = (block - (last - blocks)[expert]) * block_rows
    rows = jnp.where(block < last[-1], jnp.minimum(sizes[expert] - first, block_rows), 0)
    return order, jnp.stack([expert, (ends - sizes)[expert] + first, rows])
