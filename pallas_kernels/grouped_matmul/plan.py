"""Which rows of which expert each program of a grouped product works on, computed on the device."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from pallas_kernels import dispatch

OP = "plan_experts"
EXPERT, START, ROWS = range(3)  # rows of `Plan.blocks`
MAX_PAIRS = 4096  # of the kernel, which compares all pairs with each other


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "blocks"],
    meta_fields=["block_rows", "choices", "num_experts"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Pairs of a token and an expert, sorted by expert and cut into blocks of one expert each.

    With blocks of 2, where the tokens 0, 1, 2 chose the experts (0, 2), (2, 0), (2, 1), pair `i` being token `i // 2`:

        order    0 3    5      1 2    4
        expert   0      1      2      2
        start    0      2      3      5
        rows     2      1      2      1
    """

    # Not `jax.Array`: functions of trees make such objects of other things too, and tests check annotations.

    order: Any  # int32[T * k], pairs by expert; those of one expert in their own order, those of none last
    blocks: Any  # int32[3, B], of each block its expert (E for none), first row in `order`, and rows: 0 if it is unused
    block_rows: int  # most rows of a block
    choices: int  # k
    num_experts: int  # E


def most_blocks(pairs: int, num_experts: int, block_rows: int) -> int:
    """Most blocks that pairs can fill: all groups have a row, and what is left makes whole blocks."""
    busy = min(pairs, num_experts + 1)  # pairs without an expert are a group too
    return busy + (pairs - busy) // block_rows


def default_block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block, from how many rows an expert has on average.

    Few rows are bound by the bytes of the weights: a block that holds twice the average seldom overflows into a second
    one, which would read them again. Many rows are bound by arithmetic, and pay for what a last block lacks.
    """
    average = pairs / num_experts
    return next((rows for rows, most in ((16, 8), (32, 16), (64, 192)) if average <= most), 128)


def plan_experts(
    chosen: Int[Array, "T k"], num_experts: int, *, block_rows: int | None = None, implementation: str | None = None
) -> Plan:
    """Sort the pairs of tokens and experts for `grouped_matmul`.

    Args:
      chosen: each token's experts. A number that is none of them, as -1, stands for no expert.
      num_experts: E.
      block_rows: rows of a block, a power of two from 16 on; by default what suits the average expert.
      implementation: `"triton"`, one launch for at most 4,096 pairs; or `"xla"`; `None` for the best that can run.

    Returns:
      The plan, which all backends give alike.

    Raises:
      ValueError: an argument is out of its range, or the backend can not run; the message says why.
    """
    pairs, choices = chosen.size, chosen.shape[1]
    if num_experts < 1 or not pairs:
        raise ValueError(f"chosen {chosen.shape} of {num_experts} experts: there must be a pair and an expert")
    if pairs * (num_experts + 2) > 2**31:
        raise ValueError(
            f"{pairs} pairs and {num_experts} experts are more than 32-bit keys tell apart: split the call"
        )
    block_rows = block_rows or default_block_rows(pairs, num_experts)
    if block_rows < 16 or block_rows & (block_rows - 1):
        raise ValueError(f"block_rows={block_rows} must be a power of two from 16 on")
    gpu = dispatch.current_gpu()
    reasons = dispatch.triton_refusals(gpu)
    if pairs > MAX_PAIRS:
        reasons.append(f"there are {pairs} pairs; the kernel is for at most {MAX_PAIRS}")
    backend = dispatch.choose(OP, {"triton": reasons, "xla": []}, implementation, gpu)
    module = importlib.import_module(f"{__package__}.plan_{backend}")
    with jax.named_scope(OP):
        chosen = chosen.astype(jnp.int32).reshape(pairs)
        order, blocks = module.plan(chosen, num_experts, most_blocks(pairs, num_experts, block_rows), block_rows)
    return Plan(order, blocks, block_rows, choices, num_experts)


def expert_of_row(plan: Plan) -> Int32[Array, "P"]:
    """Expert of each row in the order of the plan; `num_experts` for none."""
    row = jnp.arange(plan.order.shape[0])
    expert, start, rows = plan.blocks
    inside = (row[:, None] >= start) & (row[:, None] < start + rows)
    return jnp.sum(jnp.where(inside, expert, 0), axis=1, dtype=jnp.int32)
