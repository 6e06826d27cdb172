"""Prefill on Hopper in Pallas-Mosaic-GPU: blocks of queries against paged keys and values.

FlashAttention-3 (arXiv 2407.08608) over a page table. A thread block has three warpgroups. One only moves data: it
reads the page table and has the copy engine (TMA) bring pages into a ring of buffers in shared memory. Two compute 64
rows each: scores and products with `wgmma`, a softmax in base 2 between them, and take turns so that one's softmax runs
while the other holds the tensor cores.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import mosaic, pl
from pallas_kernels.ragged_paged_attention.blocks import num_query_blocks, query_blocks

ROWS = 64  # of a warpgroup: what one `wgmma` takes
COMPUTE = 2  # warpgroups that compute
COLUMNS = 64  # of 16 bits: a swizzle of 128 bytes
SWIZZLE = 128
ALIGN = 8  # rows of a swizzle atom: where in an array a copy of a tile may start
LOWEST = -1e30  # where the running maximum starts: finite, so that a row with nothing visible stays free of NaN
HEAD_DIMS = (64, 128, 256)
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a block's work.

    Attributes:
      heads: query heads of one key head that share a tile.
      keys: keys of a tile.
      stages: tiles of keys and of values in flight.
      registers: of a thread that computes, and of one that moves data; twice the first and the second are at most 512.
    """

    heads: int
    keys: int
    stages: int
    registers: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Query tokens of a warpgroup."""
        return ROWS // self.heads

    def copies(self, page_size: int) -> int:
        """Copies that bring a tile of keys or of values."""
        return max(1, self.keys // page_size)


@dataclasses.dataclass(frozen=True)
class Features:
    """What is compiled into the kernel.

    Attributes:
      scale: of the products of queries and keys, positive.
      window: keys that a query sees, its own included, or `None`.
      soft_cap: limit of the scores, or `None`.
      causal: whether a query sees none after its own.
      has_sinks: whether each head has one more score, of nothing.
      has_starts: whether a slot's first key that is seen may be another than its first.
    """

    scale: float
    window: int | None
    soft_cap: float | None
    causal: bool
    has_sinks: bool
    has_starts: bool


def tiling(group: int, head_dim: int) -> Tiling:
    """Sizes for a group of query heads: as many of them in a tile as divide it, so that short chunks fill tiles too."""
    # A tile of 64 rows has place for 8 heads of 8 tokens: fewer tokens could not be copied.
    heads = math.gcd(group, ROWS // ALIGN)
    if head_dim == 256:
        return Tiling(heads, keys=64, stages=2, registers=(240, 32))
    return Tiling(heads, keys=128, stages=4 if head_dim == 64 else 2, registers=(232, 40))


def prefill(
    q, key_pages, value_pages, page_table, cu_q_lens, kv_lens, *, scale, window, soft_cap, causal, sinks, kv_starts
):
    """Attention of the slots with more than one query; rows of slots with one are left unwritten.

    Args:
      q: `[T, N, H]`, bfloat16 or float16.
      key_pages: `[P, K, p, H]` in the dtype of `q`.
      value_pages: likewise.
      page_table: `int32[S, M]`.
      cu_q_lens: `int32[S + 1]`.
      kv_lens: `int32[S]`.
      scale: of the scores, positive.
      window: keys that a query sees, its own included, or `None`.
      soft_cap: bound of the scores, or `None`.
      causal: whether keys after a query are hidden.
      sinks: `[N]` or `None`.
      kv_starts: `int32[S]` or `None`.

    Returns:
      Output `[T, N, H]` in the dtype of `q` and log-sum-exp `float32[T, N]`; padding is 0 and minus infinity.
    """
    tokens, heads, head_dim = q.shape
    slots = page_table.shape[0]
    sizes = tiling(heads // key_pages.shape[1], head_dim)
    # Copies of tiles start at multiples of 8 rows and are not larger than what they copy from.
    padded = max(-(-tokens // ALIGN) * ALIGN, sizes.tokens)
    q = jnp.pad(q, ((0, padded - tokens), (0, 0), (0, 0)))

    # Padding is one more slot, which sees nothing.
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    q_lens = jnp.append(jnp.where(q_lens > 1, q_lens, 0), tokens - cu_q_lens[-1])
    block = COMPUTE * sizes.tokens
    reach = jnp.where(q_lens > 0, q_lens + cu_q_lens % ALIGN, 0)  # a slot's first block may start before its rows
    most = min(slots, tokens // 2) + 1
    num_blocks = num_query_blocks(tokens + most * (ALIGN - 1), most, block)
    first_keys = jnp.zeros_like(kv_lens) if kv_starts is None else jnp.maximum(kv_starts, 0)
    of_slots = (cu_q_lens, q_lens, jnp.append(kv_lens, 0), jnp.append(first_keys, 0))
    slot, start = query_blocks(reach, block, num_blocks)
    work = _work(slot, start, *of_slots, sizes, window=window, causal=causal)
    features = Features(scale, window, soft_cap, causal, sinks is not None, kv_starts is not None)
    sinks = jnp.zeros((heads,)) if sinks is None else sinks
    operands = (q, key_pages, value_pages, page_table, work, sinks.astype(jnp.float32))
    out, lse = _call(sizes, features, num_blocks, *operands)
    return out[:tokens], _in_rows(lse, tokens, cu_q_lens, reach, sizes)


# Columns of the table of work: one row for each block of queries.
FIRST_ROW, OWN_BEGIN, OWN_END, POSITION, KV_LEN, KV_START, FIRST_KEY, NUM_TILES, SLOT = range(9)


def _work(slot, start, cu_q_lens, q_lens, kv_lens, kv_starts, sizes, *, window, causal):
    """Where each block of queries stands and which tiles of keys it sees: `int32[B, 9]`, a slot's last blocks first."""
    used, slot = slot < q_lens.shape[0], jnp.minimum(slot, q_lens.shape[0] - 1)
    own, kv_len, first_key = cu_q_lens[slot], kv_lens[slot], kv_starts[slot]
    end_key = kv_len
    first_row = own // ALIGN * ALIGN + start
    begin, end = jnp.maximum(first_row, own), jnp.minimum(first_row + COMPUTE * sizes.tokens, own + q_lens[slot])
    shift = kv_len - q_lens[slot] - own  # from row to position
    columns = [first_row, begin, jnp.where(used, end, 0), first_row + shift, kv_len, first_key]
    if window is not None:
        first_key = jnp.maximum(first_key, begin + shift - window + 1)
        end_key = jnp.minimum(end_key, end + shift - 1 + window)
    if causal:
        end_key = jnp.minimum(end_key, end + shift)
    tiles = (end_key + sizes.keys - 1) // sizes.keys - first_key // sizes.keys
    num = jnp.maximum(tiles, 1)  # a block that sees nothing takes a tile too, all masked
    # A slot's last blocks see most keys: they go first, so that short ones fill the gaps at the end.
    return jnp.stack([*columns, first_key, num, jnp.minimum(slot, kv_lens.shape[0] - 2)], axis=1).astype(jnp.int32)[
        ::-1
    ]


def _in_rows(lse, tokens, cu_q_lens, reach, sizes):
    """Brings the log-sum-exp from the order of the tiles to `[T, N]`, minus infinity for padding."""
    num_blocks, groups = lse.shape[:2]
    block = COMPUTE * sizes.tokens
    rows = jnp.arange(tokens)
    slot = jnp.sum(rows[:, None] >= cu_q_lens[1:], axis=1)
    blocks = (reach + block - 1) // block
    within = rows - cu_q_lens[slot] // ALIGN * ALIGN
    index = (jnp.cumsum(blocks) - blocks)[slot] + within // block
    place = within % block
    lse = lse.reshape(num_blocks, groups, COMPUTE, sizes.heads, sizes.tokens)
    lse = lse[num_blocks - 1 - index, :, place // sizes.tokens, :, place % sizes.tokens].reshape(tokens, -1)
    return jnp.where((slot == cu_q_lens.shape[0] - 1)[:, None], -jnp.inf, lse)


def _call(sizes, features, num_blocks, *operands):
    """Launches the kernel over all blocks of queries and groups of heads."""
    q, key_pages, *_ = operands
    plgpu = mosaic()
    heads, head_dim = q.shape[1:]
    page_size = key_pages.shape[2]
    copies = sizes.copies(page_size)
    groups = heads // sizes.heads
    tiled = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(SWIZZLE))

    def buffer(*shape):
        return plgpu.SMEM((*shape, head_dim), q.dtype, transforms=tiled)

    def ring(arrivals, more=0):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=sizes.stages + more)

    return plgpu.kernel(
        functools.partial(_kernel, sizes=sizes, features=features),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_blocks, groups, COMPUTE * ROWS), jnp.float32),
        ),
        scratch_types={
            "q_tiles": buffer(COMPUTE, ROWS),
            "k_tiles": buffer(sizes.stages, sizes.keys),
            "v_tiles": buffer(sizes.stages, sizes.keys),
            "staged": plgpu.SMEM((COMPUTE, ROWS, COLUMNS), q.dtype),
            "lse_rows": plgpu.SMEM((COMPUTE * ROWS,), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=sizes.heads, num_barriers=COMPUTE),
            "k_ready": ring(copies),
            "v_ready": ring(copies, more=1),  # the last is for a tile that is cut off
            "k_free": ring(COMPUTE),
            "v_free": ring(COMPUTE),
            "turn": plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE),
        },
        grid=(num_blocks, groups),  # the last axis runs fastest: heads that read the same pages run side by side
        grid_names=("block", "group"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name="ragged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands)


def _kernel(q, key_pages, value_pages, page_table, work, sinks, out, lse, *, sizes, features, **scratch):
    plgpu = mosaic()
    block, group = lax.axis_index("block"), lax.axis_index("group")
    warpgroup = lax.axis_index("warpgroup")
    job = work.at[block]

    @pl.when(job[OWN_END] > 0)
    def _():
        @pl.when(warpgroup < COMPUTE)
        def _():
            plgpu.set_max_registers(sizes.registers[0], action="increase")
            copies = sizes.copies(key_pages.shape[2])
            _compute(q, sinks, out, lse.at[block, group], job, group, warpgroup, copies, sizes, features, scratch)

        @pl.when(warpgroup == COMPUTE)
        def _():
            plgpu.set_max_registers(sizes.registers[1], action="decrease")
            head = group * sizes.heads // (q.shape[1] // key_pages.shape[1])
            _produce(key_pages, value_pages, page_table, job, head, sizes, scratch)


def _produce(key_pages, value_pages, page_table, job, head, sizes, scratch):
    """Brings keys and values, the last tile first; outside of what is seen it brings the nearest page again."""
    plgpu = mosaic()
    page_size = key_pages.shape[2]
    rows = min(page_size, sizes.keys)
    copies = sizes.copies(page_size)
    first_seen, num, slot, kv_len = (job[column] for column in (FIRST_KEY, NUM_TILES, SLOT, KV_LEN))
    first = first_seen // sizes.keys
    first_page, last_page = first_seen // page_size, jnp.maximum(kv_len - 1, 0) // page_size
    last = first + num - 1
    is_cut = (last + 1) * sizes.keys > kv_len

    def issue(index, is_first_round):
        stage = index & (sizes.stages - 1)
        first_key = (last - index) * sizes.keys
        # Read before waiting: the table's latency hides behind the tile in work.
        places = [jnp.clip((first_key + i * rows) // page_size, first_page, last_page) for i in range(copies)]
        pages = [page_table[slot, place] for place in places]
        offset = first_key & (page_size - 1) if page_size > rows else 0
        v_barrier = jnp.where(is_cut & (index == 0), sizes.stages, stage) if is_first_round else stage
        for pool, name, barrier in ((key_pages, "k", stage), (value_pages, "v", v_barrier)):
            if not is_first_round:
                plgpu.barrier_wait(scratch[f"{name}_free"].at[stage])
            for i, page in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    pool.at[page, head, pl.ds(offset, rows)],
                    scratch[f"{name}_tiles"].at[stage, pl.ds(i * rows, rows)],
                    scratch[f"{name}_ready"].at[barrier],
                )

    stages = jnp.int32(sizes.stages)
    pl.loop(0, jnp.minimum(num, stages))(functools.partial(issue, is_first_round=True))
    pl.loop(stages, num)(functools.partial(issue, is_first_round=False))


def _compute(q, sinks, out, lse, job, group, warpgroup, copies, sizes, features, scratch):
    """Rows of one warpgroup, from queries to output. Row `h * tokens + t` of its tile is token `t` of head `h`."""
    plgpu = mosaic()
    head_dim, tokens, window = q.shape[-1], sizes.tokens, features.window
    q_tile, staged = scratch["q_tiles"].at[warpgroup], scratch["staged"].at[warpgroup]
    turn = scratch["turn"]
    first_row = job[FIRST_ROW] + warpgroup * tokens
    for h in range(sizes.heads):
        plgpu.copy_gmem_to_smem(
            q.at[pl.ds(first_row, tokens), group * sizes.heads + h],
            q_tile.at[pl.ds(h * tokens, tokens)],
            scratch["q_ready"].at[warpgroup],
        )

    position = job[POSITION] + warpgroup * tokens
    num, kv_len, kv_start = (job[column] for column in (NUM_TILES, KV_LEN, KV_START))
    last = job[FIRST_KEY] // sizes.keys + num - 1
    factor = (features.scale if features.soft_cap is None else features.soft_cap) * LOG2E

    def stage_of(index):
        return index & (sizes.stages - 1)

    def visible(tile):
        row, key = (_iota((ROWS, sizes.keys), axis) for axis in (0, 1))
        # A thread's columns are its own offset below 8 plus constants: what varies goes to one side of the comparison
        # and is the same for all columns, the constants stay on the other and take no registers.
        offset = tile * sizes.keys + (key & 7)
        own = position + (row & (tokens - 1))
        highest = own  # a row past the slot's last sees keys that are none, and is never stored
        if not features.causal:
            highest = jnp.full_like(own, kv_len - 1)
            if window is not None:
                highest = jnp.minimum(own + (window - 1), highest)
        seen = (key & -8) <= highest - offset
        if window is not None or features.has_starts:
            lowest = jnp.full_like(own, kv_start)
            if window is not None:
                lowest = jnp.maximum(own - (window - 1), lowest)
            seen &= (key & -8) >= lowest - offset
        return seen

    def softmax(index, scores, highest, total):
        plgpu.barrier_arrive(scratch["k_free"].at[stage_of(index)])
        if features.soft_cap is not None:
            # Not `tanh`: the instruction for it is good for 11 bits, too few for a score.
            power = jnp.exp2(scores * (2 * LOG2E * features.scale / features.soft_cap))
            scores = 1 - 2 / (1 + power)
        scores = lax.cond(
            (index < full) | (index >= full_end),
            lambda: jnp.where(visible(last - index), scores, -jnp.inf),
            lambda: scores,
        )
        new = jnp.maximum(highest, scores.max(axis=1) * factor)
        correction = jnp.exp2(highest - new)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
        total = total * correction + weights.sum(axis=1)
        return lax.optimization_barrier((new, total, correction, weights))

    def step(index, carry):
        acc, highest, total, weights = carry
        before, stage = stage_of(index - 1), stage_of(index)
        plgpu.barrier_wait(scratch["k_ready"].at[stage])
        plgpu.barrier_wait(scratch["v_ready"].at[before])
        plgpu.barrier_wait(turn.at[warpgroup])
        acc, highest, total, correction, new = _scores_and_sum(
            (q_tile, scratch["k_tiles"].at[stage]),
            (acc, weights, scratch["v_tiles"].at[before]),
            lambda: plgpu.barrier_arrive(turn.at[1 - warpgroup]),
            lambda scores: softmax(index, scores, highest, total),
            (highest, total, highest, weights.astype(jnp.float32)),
        )
        plgpu.barrier_arrive(scratch["v_free"].at[before])
        # Rounded only here: until now the sum was reading its weights from the same registers.
        return acc * lax.broadcast_in_dim(correction, acc.shape, [0]), highest, total, new.astype(q.dtype)

    highest, total = jnp.full((ROWS,), LOWEST, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
    if features.has_sinks:  # as if it were a key seen before all others, with nothing for its value
        for h in range(sizes.heads):
            sink = jnp.maximum(sinks[group * sizes.heads + h] * LOG2E, LOWEST)
            highest = jnp.where(_iota((ROWS,), 0) >= h * tokens, sink, highest)
        total += 1

    # Tiles `full` to `full_end`, counted from the last, are seen by all rows as a whole. The others are masked.
    keys_end = position + 1
    if not features.causal:
        keys_end = kv_len if window is None else jnp.minimum(kv_len, position + window)
    full, full_end = jnp.clip(last + 1 - keys_end // sizes.keys, 1, num), num
    if window is not None or features.has_starts:
        lowest = kv_start
        if window is not None:
            lowest = jnp.maximum(lowest, position + tokens - window)
        full_end = jnp.clip(last + 1 - (lowest + sizes.keys - 1) // sizes.keys, full, num)

    plgpu.barrier_wait(scratch["q_ready"].at[warpgroup])
    plgpu.barrier_wait(scratch["k_ready"].at[0])
    scores = _scores(q_tile, scratch["k_tiles"].at[0])
    highest, total, _, weights = softmax(jnp.int32(0), scores, _rows(highest), _rows(total))
    end = kv_len - last * sizes.keys

    @pl.when((warpgroup == 0) & (end < sizes.keys))
    def _():
        # Past the slot's end lies anything, and zero times NaN is NaN. The values are ready when that is gone.
        plgpu.barrier_wait(scratch["v_ready"].at[sizes.stages])
        for row in range(0, sizes.keys, ROWS):
            for column in range(0, head_dim, COLUMNS):
                part = scratch["v_tiles"].at[0, pl.ds(row, ROWS), pl.ds(column, COLUMNS)]
                values = part[...]
                part[...] = jnp.where(_iota(values.shape, 0) < end - row, values, 0).astype(values.dtype)
        plgpu.commit_smem()
        for _ in range(copies):
            plgpu.barrier_arrive(scratch["v_ready"].at[0])

    carry = _rows(jnp.zeros((ROWS, head_dim), jnp.float32)), highest, total, weights.astype(q.dtype)
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
    carry = lax.fori_loop(jnp.int32(1), num, step, carry)
    acc, highest, total, weights = carry
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
    plgpu.barrier_wait(scratch["v_ready"].at[stage_of(num - 1)])
    acc = _sum(acc, weights, scratch["v_tiles"].at[stage_of(num - 1)])

    seen = total > 0
    inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)
    q_tile[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(q.dtype)
    lse_rows = scratch["lse_rows"].at[pl.ds(warpgroup * ROWS, ROWS)]
    lse_rows[...] = jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + highest / LOG2E, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_rows, lse.at[pl.ds(warpgroup * ROWS, ROWS)])
    # Read again: they would take registers all the while.
    first_row = job[FIRST_ROW] + warpgroup * tokens
    begin, end = (jnp.clip(job[column] - first_row, 0, tokens) for column in (OWN_BEGIN, OWN_END))
    rows = end - begin

    @pl.when(rows == tokens)
    def _():
        for h in range(sizes.heads):
            plgpu.copy_smem_to_gmem(
                q_tile.at[pl.ds(h * tokens, tokens)],
                out.at[pl.ds(first_row, tokens), group * sizes.heads + h],
            )

    @pl.when((rows > 0) & (rows < tokens))
    def _():
        # The other rows are another slot's. Copies have static sizes, so it takes one for each bit of the count, and
        # single rows can not be cut out of a swizzled tile.
        for column in range(0, head_dim, COLUMNS):
            plgpu.wait_smem_to_gmem(0)
            _store_rows(staged, q_tile.at[:, pl.ds(column, COLUMNS)][...])
            plgpu.commit_smem()
            for bit in range(tokens.bit_length() - 1):
                row = begin + (rows & -(2 << bit))

                @pl.when((rows & (1 << bit)) != 0)
                def _(row=row, size=1 << bit, column=column):
                    for h in range(sizes.heads):
                        plgpu.copy_smem_to_gmem(
                            staged.at[pl.ds(h * tokens + row, size)],
                            out.at[pl.ds(first_row + row, size), group * sizes.heads + h, pl.ds(column, COLUMNS)],
                        )

    plgpu.wait_smem_to_gmem(0)


def _rows(x):
    """Lays an array, or a number for each row, out over a warpgroup as `wgmma` leaves its result."""
    layout = mosaic().Layout.WGMMA
    return mosaic().layout_cast(x, layout.reduce(1) if x.ndim == 1 else layout)


def _iota(shape, axis):
    """Row (axis 0) or column (axis 1) of each element of a tile; of each row if `shape` is that of one column."""
    plgpu = mosaic()
    # By one axis first: the compiler does not see through the arithmetic on both that all rows share their columns.
    line = plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    return line if len(shape) == 1 else lax.broadcast_in_dim(line, shape, (axis,))


def _store_rows(ref, x):
    """Stores a tile row by row, unlike how it lies in registers; newer JAX wants to be told that this is slow."""
    plgpu = mosaic()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _scores(q_tile, k_tile):
    """`q_tile @ k_tile.T` in float32."""
    plgpu = mosaic()

    def product(acc: Any):
        plgpu.wgmma(acc, q_tile, k_tile.T)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((q_tile.shape[0], k_tile.shape[0]), jnp.float32))


def _sum(acc, weights, v_tile):
    """`acc + weights @ v_tile`."""
    plgpu = mosaic()
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_tile))(plgpu.ACC.init(acc))


def _scores_and_sum(tiles, summands, started, use, like):
    """`_scores` and `_sum` at once.

    Args:
      tiles: arguments of `_scores`.
      summands: arguments of `_sum`.
      started: called when both are under way.
      use: takes the scores while the sum is still under way.
      like: arrays of the shapes and dtypes that `use` gives.

    Returns:
      The sum, and what `use` gives.
    """
    plgpu = mosaic()
    (q_tile, k_tile), (acc, weights, v_tile) = tiles, summands

    def products(refs: Any):
        total, *results = refs

        def start(scores: Any):
            plgpu.wgmma(scores, q_tile, k_tile.T)
            plgpu.wgmma(total, weights, v_tile)
            started()
            return plgpu.wgmma_accumulator_load(scores, wait_n=1)

        scores = pl.run_scoped(start, plgpu.ACC((q_tile.shape[0], k_tile.shape[0]), jnp.float32))
        for ref, result in zip(results, use(scores), strict=True):
            ref[...] = result

    return pl.run_state(products)((plgpu.ACC.init(acc), *like))
