"""What differs where the weights are in few bits: when the kernel can run, and its sizes."""

from pallas_kernels.compat import pl
from pallas_kernels.quantized_matmul.decode import DTYPES

KIB = 2**10
IN_FLIGHT = 32 * KIB  # bytes of the weights that a program should have under way
SHARED = 96 * KIB  # shared memory that every GPU from 8.0 on gives a program
# With few rows, tiles are narrowed until so many of the multiprocessors have a program: fewer than with plain weights,
# since what is not decoding costs the same for a narrow tile.
FILL = 0.8
# Rows of the weight in a tile by rows of a block, where tensor cores read packed weights from registers of four warps;
# and where each warp reads its own, which takes more of them.
WIDEST_OF_GROUPS = {16: 128, 32: 256, 64: 256, 128: 128}
WIDEST = {16: 128, 32: 128, 64: 64, 128: 64}


def refusals(x, weight):
    """Why the kernel can not run on weights in few bits."""
    reasons = []
    if weight.format.layout != "tiles":
        reasons.append("the weights are in rows; lay them out with to_tiles, once")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}; the kernel for weights in few bits is for bfloat16 and float16")
    # Triton's offsets into arrays of 16 bits have 64 bits from 4 GiB on.
    return reasons


def block_sizes(block_rows, columns, weight, *, gated, busy, gpu):
    """As `triton.block_sizes`, where the contracted axis goes by units."""
    needed = FILL * (8 if gpu is None else gpu.cores) if block_rows <= 32 else 0
    _, units, _, words = weight.values.shape
    has_groups = gpu is None or gpu.capability[0] in (9, 10)
    block_n = (WIDEST_OF_GROUPS if has_groups else WIDEST).get(block_rows, 64) // (2 if gated else 1)
    # What goes with groups is loaded a step ahead, into registers.
    if block_rows >= 64 and (weight.minimums is not None or (block_rows == 64 and weight.zeros is not None)):
        block_n //= 2
    while pl.cdiv(columns, block_n) * busy < needed and block_n > 32:
        block_n //= 2
    block_n = min(block_n, max(16, pl.next_power_of_2(columns)))
    rows_of_weight = block_n * (2 if gated else 1)
    step = 2 * words * rows_of_weight + 2 * weight.shape[2] // units * block_rows
    most = 5 if has_groups or block_rows < 128 else 2
    stages = min(most, 1 + pl.cdiv(IN_FLIGHT, 2 * words * rows_of_weight), 1 + units, SHARED // step)
    return {
        "block_n": block_n,
        "num_warps": 4 if rows_of_weight * block_rows < 256 * 32 or (has_groups and rows_of_weight < 128) else 8,
        "num_stages": max(stages, 1),
    }
