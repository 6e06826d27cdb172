"""The plan as one Pallas-Triton launch.

Pairs are few, so a pair's place is how many others come before it: every program compares some of them with all. One
more program counts the rows of each expert and cuts them into blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton, triton_call

PAIRS = 64  # that a program finds the places of
STEP = 32  # pairs that they are compared with at a time


def plan(chosen, num_experts, num_blocks, block_rows):
    """As `plan_xla.plan`."""
    pairs = chosen.shape[0]
    return triton_call(
        functools.partial(_kernel, num_experts=num_experts, block_rows=block_rows),
        chosen,
        out_shape=[
            jax.ShapeDtypeStruct((pairs,), jnp.int32),
            jax.ShapeDtypeStruct((3, num_blocks), jnp.int32),
        ],
        grid=(1 + pl.cdiv(pairs, PAIRS),),
        name="plan_experts",
        num_warps=4,
        num_stages=1,
    )


def _kernel(chosen_ref, order_ref, blocks_ref, *, num_experts, block_rows):
    program = pl.program_id(0)
    pl.when(program == 0)(lambda: _write_blocks(chosen_ref, blocks_ref, num_experts, block_rows))
    pl.when(program > 0)(lambda: _write_order(chosen_ref, order_ref, program - 1, num_experts))


def _experts(chosen_ref, pair, num_experts):
    """Experts of some pairs; past the last pair one that comes after all."""
    is_pair = pair < chosen_ref.shape[0]
    expert = pltriton.load(chosen_ref.at[pair], mask=is_pair, other=jnp.int32(0))
    expert = jnp.where((expert < 0) | (expert >= num_experts), num_experts, expert)
    return jnp.where(is_pair, expert, num_experts + 1)


def _sum_over_pairs(chosen_ref, num_experts, shape, count):
    """The sum of `count(pairs, their experts)` over all pairs, a few at a time."""

    def step(i, total):
        pair = i * STEP + jnp.arange(STEP, dtype=jnp.int32)
        found = count(pair, _experts(chosen_ref, pair, num_experts))
        return total + jnp.sum(found.astype(jnp.int32), axis=1)

    return lax.fori_loop(0, pl.cdiv(chosen_ref.shape[0], STEP), step, jnp.zeros(shape, jnp.int32))


def _write_order(chosen_ref, order_ref, program, num_experts):
    pairs = chosen_ref.shape[0]
    mine = program * PAIRS + jnp.arange(PAIRS, dtype=jnp.int32)
    key = _experts(chosen_ref, mine, num_experts) * pairs + mine

    def before(pair, expert):
        return (expert * pairs + pair)[None, :] < key[:, None]

    place = _sum_over_pairs(chosen_ref, num_experts, (PAIRS,), before)
    pltriton.store(order_ref.at[place], mine, mask=mine < pairs)


def _write_blocks(chosen_ref, blocks_ref, num_experts, block_rows):
    pairs, num_blocks = chosen_ref.shape[0], blocks_ref.shape[1]
    index = jnp.arange(pl.next_power_of_2(num_experts), dtype=jnp.int32)
    sizes = _sum_over_pairs(chosen_ref, num_experts, index.shape, lambda _, expert: expert[None, :] == index[:, None])
    sizes = jnp.where(index < num_experts, sizes, 0)
    starts = jnp.cumsum(sizes) - sizes
    blocks = pl.cdiv(sizes, block_rows)
    last = jnp.cumsum(blocks)

    def write(at, mask, *values):
        for row, value in enumerate(values):
            place = blocks_ref.at[jnp.full(at.shape, row, jnp.int32), at]
            pltriton.store(place, jnp.broadcast_to(value, at.shape), mask=mask)

    def write_one_each(i, carry):
        rows = jnp.minimum(sizes - i * block_rows, block_rows)
        write(last - blocks + i, i < blocks, index, starts + i * block_rows, rows)
        return carry

    lax.fori_loop(0, jnp.max(blocks), write_one_each, 0)
    # Then those of pairs without an expert, and behind them nothing.
    block = jnp.arange(pl.next_power_of_2(num_blocks), dtype=jnp.int32)
    start = jnp.sum(sizes) + (block - jnp.max(last)) * block_rows
    rows = jnp.clip(pairs - start, 0, block_rows)
    write(block, (block >= jnp.max(last)) & (block < num_blocks), jnp.int32(num_experts), start, rows)
