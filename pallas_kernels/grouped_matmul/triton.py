"""The product as one Pallas-Triton launch.

A program owns a block of rows of one expert and a tile of output columns, and goes through the whole contracted axis:
its rows it takes from wherever the plan says, a tile of them beside each tile of the weight. With few rows it is bound
by the bytes of the weights, and like `few_row_matmul` keeps several tiles in flight; with many it is a product on
tensor cores like any other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.few_row_matmul.triton import ACTIVATIONS
from pallas_kernels.grouped_matmul import triton_quantized
from pallas_kernels.grouped_matmul.plan import EXPERT, ROWS, START, Plan
from pallas_kernels.grouped_matmul.weights import QuantizedExperts
from pallas_kernels.quantized_matmul.triton_tile import sums_of_products

OP = "grouped_matmul"
KIB = 2**10
WEIGHT_TILE = 16 * KIB  # bytes that a program loads at a time where rows are few
IN_FLIGHT = 48 * KIB  # bytes of the weight that a program should have under way
FILL = 1.6  # with few rows, tiles are narrowed until there are so many programs for each multiprocessor
FEW_ROWS = 32  # of a block that is bound by the bytes of the weights
BLOCKS_TOGETHER = 8  # whose programs run side by side, so that they find each other's rows and weights in L2


def refusals(x, weight, plan, gpu):
    """Why the kernel can not run."""
    reasons = dispatch.triton_refusals(gpu)
    if isinstance(weight, QuantizedExperts):
        reasons += triton_quantized.refusals(x, weight)
    elif x.dtype != weight.dtype:
        reasons.append(f"x is {x.dtype} and the weights {weight.dtype}; the kernel needs both alike")
    if not x.shape[1] or not weight.shape[1]:
        reasons.append(f"weight {weight.shape} is empty, and Triton can not launch an empty grid")
    if max(x.size, plan.order.shape[0] * weight.shape[1]) > 2**31:
        reasons.append("rows have more elements than 32-bit offsets reach")
    return reasons


def block_sizes(block_rows, columns, inner, *, gated, busy, dtype, gpu):
    """Sizes where the table is silent.

    Args:
      block_rows: of the plan.
      columns: of the result.
      inner: length of the contracted axis.
      gated: whether a program has a tile of gate rows and one of up rows.
      busy: experts that are expected to have rows.
      dtype: of `x` and the weights.
      gpu: what is compiled for, or `None`.

    Returns:
      `block_n`, columns of a program; `block_k`, length of a step; `num_warps`; `num_stages`.
    """
    size, tiles = jnp.dtype(dtype).itemsize, 2 if gated else 1
    few = block_rows <= FEW_ROWS
    # Float32 does without the tensor cores, and threads hold whole slices of its operands.
    if size == 4:
        widest, block_k = 32, 32
    elif few:
        widest, block_k = 4 * block_rows, 0
    else:
        # The larger the tile, the fewer bytes an operation costs; 8 warps of Hopper hold one of 128 x 256.
        is_large = block_rows >= 128 and gpu is not None and gpu.capability[0] in (9, 10)
        widest, block_k = 256 if is_large else 128, 64

    block_n = min(widest // tiles, max(16, pl.next_power_of_2(columns)))
    needed = FILL * (8 if gpu is None else gpu.cores)
    while few and block_n > 16 and pl.cdiv(columns, block_n) * busy < needed:
        block_n //= 2
    block_k = block_k or min(256, WEIGHT_TILE // (size * block_n * tiles))
    while block_k > 32 and inner % block_k:
        block_k //= 2

    weight_tile = size * block_n * block_k * tiles
    stage = weight_tile + size * block_rows * block_k
    stages = min(8, 1 + pl.cdiv(IN_FLIGHT, weight_tile)) if few else 4
    stages = max(1, min(stages, 1 + pl.cdiv(inner, block_k), (96 * KIB if few else _shared_memory(gpu)) // stage))
    return {"block_n": block_n, "block_k": block_k, "num_warps": 8 if block_rows >= 128 else 4, "num_stages": stages}


def _shared_memory(gpu):
    """Bytes that a program of many rows may take."""
    if gpu is None or gpu.capability[0] in (9, 10):
        return 200 * KIB
    return (144 if gpu.capability == (8, 0) else 96) * KIB


def expected_busy(pairs: int, num_experts: int) -> int:
    """Experts that have a row, if pairs choose evenly and at random."""
    return max(1, round(num_experts * (1 - (1 - 1 / num_experts) ** pairs)))


def default_sizes(block_rows, columns, weight, *, gated, busy, dtype, gpu):
    """`block_sizes` of plain weights, or those of weights in few bits."""
    if isinstance(weight, QuantizedExperts):
        return triton_quantized.block_sizes(block_rows, columns, weight, gated=gated, busy=busy, gpu=gpu)
    return block_sizes(block_rows, columns, weight.shape[2], gated=gated, busy=busy, dtype=dtype, gpu=gpu)


def matmul(x, weight, plan: Plan, *, gather, scatter, bias, activation, gated, scale, dtype, config=None):
    """See `api.grouped_matmul`.

    `config` is what `block_sizes` returns. By default it comes from the table of tuned sizes, by `block_rows`,
    `columns` of the result, `inner`, `gated`, `busy` (experts expected to have rows, rounded up to a power of two) and
    `dtype`, or the element of quantized weights.
    """
    num_experts, out, inner = weight.shape
    pairs = plan.order.shape[0]
    gated = gated and activation is not None
    columns = out // (2 if gated else 1)
    gpu = dispatch.current_gpu()
    busy = expected_busy(pairs, num_experts)
    is_quantized = isinstance(weight, QuantizedExperts)
    shape = {"columns": columns, "inner": inner, "gated": gated, "busy": pl.next_power_of_2(busy)}
    shape["dtype"] = weight.format.element if is_quantized else str(x.dtype)
    config = (
        config
        or dispatch.tuned(OP, gpu, block_rows=plan.block_rows, **shape)
        or default_sizes(plan.block_rows, columns, weight, gated=gated, busy=busy, dtype=x.dtype, gpu=gpu)
    )
    inputs = {"x": x, "order": plan.order, "blocks": plan.blocks, "bias": bias}
    inputs["scale"] = None if scale is None else scale.reshape(-1)
    if is_quantized:
        inputs |= {name: getattr(weight, name) for name in ("values", "zeros", "minimums", "tensor_scale")}
        inputs["scales"] = weight.scales
    else:
        inputs["weight"] = weight
    inputs = {name: each for name, each in inputs.items() if each is not None}
    result = triton_call(
        functools.partial(
            _kernel,
            names=(*inputs, "out"),
            experts=num_experts,
            format=weight.format if is_quantized else None,
            block_m=plan.block_rows,
            block_n=config["block_n"],
            block_k=config.get("block_k"),
            gather=gather,
            scatter=scatter,
            choices=plan.choices,
            activation=activation,
            gated=gated,
        ),
        *inputs.values(),
        out_shape=jax.ShapeDtypeStruct((pairs, columns), dtype),
        grid=(plan.blocks.shape[1] * pl.cdiv(columns, config["block_n"]),),
        name=OP,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return result.reshape(plan.choices, -1, columns) if scatter else result


def _place(program, num_blocks, tiles, together):
    """Block and tile of a program; those of some blocks run together, a tile of all of them after the other.

    With 2 of 3 blocks together and 2 tiles, programs 0 to 5 have the blocks 0 1 0 1 2 2 and the tiles 0 0 1 1 0 1.
    """
    if together == 1:
        return lax.div(program, tiles), lax.rem(program, tiles)
    first = lax.div(program, together * tiles) * together
    size = jnp.minimum(num_blocks - first, together)
    within = program - first * tiles
    return first + lax.rem(within, size), lax.div(within, size)


def _kernel(*refs, names, experts, format, block_m, block_n, block_k, gather, scatter, choices, activation, gated):
    refs = dict(zip(names, refs, strict=True))
    (pairs, columns), inner = refs["out"].shape, refs["x"].shape[1]
    together = 1 if block_m <= FEW_ROWS else BLOCKS_TOGETHER
    block, tile = _place(pl.program_id(0), refs["blocks"].shape[1], pl.cdiv(columns, block_n), together)
    rows = refs["blocks"][ROWS, block]
    # Packed weights go to the left where rows are many: Hopper's tensor cores read that side from registers.
    swap = format is not None and block_m >= 32

    def of_row(vector):
        return vector[None, :] if swap else vector[:, None]

    def of_column(vector):
        return vector[:, None] if swap else vector[None, :]

    @pl.when(rows > 0)
    def _():
        expert, start = refs["blocks"][EXPERT, block], refs["blocks"][START, block]
        row = jnp.arange(block_m, dtype=jnp.int32)
        is_row = row < rows
        # Past the last row the first one again, so that loads of many rows need no mask. Of few, most may be missing:
        # masked out, they cost nothing.
        place = start + jnp.where(is_row, row, 0)
        is_loaded = is_row[:, None] if block_m <= FEW_ROWS else None
        pair = pltriton.load(refs["order"].at[place])
        source = lax.div(pair, jnp.int32(choices)) if gather else place
        column = tile * block_n + jnp.arange(block_n, dtype=jnp.int32)
        weight_row = column if columns % block_n == 0 else jnp.minimum(column, columns - 1)
        starts = (0, columns) if gated else (0,)
        # Pairs without an expert read nothing.
        is_expert = expert < experts
        expert = jnp.minimum(expert, experts - 1)

        def load_x(k, is_inner=None):
            return _load(refs["x"].at[source[:, None], k[None, :]], is_loaded, is_inner)

        steps = pl.cdiv(inner, block_k) if format is None else refs["values"].shape[1]
        steps = jnp.where(is_expert, jnp.int32(steps), jnp.int32(0))
        if format is None:
            options = {"inner": inner, "block_m": block_m, "block_k": block_k, "steps": steps}
            sums = _sums_of_products(refs, load_x, expert, weight_row, starts, **options)
        else:
            options = {
                "format": format,
                "block_m": block_m,
                "swap": swap,
                "steps": (jnp.int32(0), steps),
                "least_group": 2 * block_m,
            }
            sums = sums_of_products(refs, load_x, weight_row, starts, lead=(expert,), **options)
        if "bias" in refs:
            biases = (pltriton.load(refs["bias"].at[expert, first + weight_row]) for first in starts)
            sums = [total + of_column(bias.astype(jnp.float32)) for total, bias in zip(sums, biases, strict=True)]
        out = _activate(sums, activation)
        if "scale" in refs:
            out *= of_row(pltriton.load(refs["scale"].at[pair]))
        out = jnp.where(is_expert, out, 0.0).astype(refs["out"].dtype)
        if scatter:
            place = lax.rem(pair, jnp.int32(choices)) * (pairs // choices) + lax.div(pair, jnp.int32(choices))
        # Interpreted, a store that is masked out still writes what it finds: not where another row goes.
        place = jnp.where(is_row, place, pairs)
        mask = jnp.broadcast_to(of_row(is_row) & of_column(column < columns), out.shape)
        pltriton.store(refs["out"].at[of_row(place), of_column(column)], out, mask=mask)


def _sums_of_products(refs, load_x, expert, weight_row, starts, *, inner, block_m, block_k, steps):
    """Products of a block's rows with a tile of their expert's plain weights; see `triton_tile.sums_of_products`."""
    precision = lax.Precision.HIGHEST if refs["x"].dtype == jnp.float32 else None

    def step(index, sums):
        k = index * block_k + jnp.arange(block_k, dtype=jnp.int32)
        is_inner = None if inner % block_k == 0 else k[None, :] < inner
        x = load_x(k, is_inner)
        contract = (((1,), (1,)), ((), ()))
        weights = [
            _load(refs["weight"].at[expert, (first + weight_row)[:, None], k[None, :]], is_inner) for first in starts
        ]
        return tuple(
            total + lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
            for total, weight in zip(sums, weights, strict=True)
        )

    zeros = jnp.zeros((block_m, weight_row.shape[0]), jnp.float32)
    return lax.fori_loop(0, steps, step, (zeros,) * len(starts))


def _activate(sums, activation):
    if activation is None:
        return sums[0]
    if activation == "clamped_swiglu":
        gate, up = jnp.minimum(sums[0], 7.0), jnp.clip(sums[1], -7.0, 7.0)
        return ACTIVATIONS["quick_gelu"](gate) * (up + 1)
    out = ACTIVATIONS[activation](sums[0])
    return out * sums[1] if len(sums) == 2 else out


def _load(ref, *conditions):
    conditions = [each for each in conditions if each is not None]
    if not conditions:
        return pltriton.load(ref)
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), ref.shape)
    return pltriton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
