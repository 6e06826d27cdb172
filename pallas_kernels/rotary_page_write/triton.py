"""Rotary and page write as one Pallas-Triton launch.

A program takes a block of rows, a row being one head of one token. Which of the three parts of the projection it has is
a branch that the whole program takes together. The halves of a rotated pair are loaded as two tiles, so no element ever
moves between threads, and masks stand for head sizes that are not powers of two.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.rotary_page_write.reference import TINY, bits, largest, reciprocal

OP = "rotary_page_write"
GIB = 2**30
PROGRAMS_PER_CORE = 4  # below this, smaller blocks: a decode step is bound by latency
BYTES = 4  # of a word
TILE = 2048  # elements a program at most: 16 a thread of 4 warps, in loads of 16 bytes


def refusals(qkv, key_pages, cos, interleaved, gpu):
    """Why the kernel can not run."""
    reasons = dispatch.triton_refusals(gpu)
    if not qkv.shape[-3]:
        reasons.append("there are no tokens, and Triton can not launch an empty grid")
    pieces = _pieces(qkv.shape[-1], 0 if cos is None else cos.shape[1], interleaved)
    if _needs_words(key_pages) and any(start % BYTES or count % BYTES for start, count in pieces):
        reasons.append(
            f"a pool of {key_pages.size / GIB:.2f} GiB in {key_pages.dtype} is written in words of {BYTES} numbers, and"
            f" rotation cuts the heads of {qkv.shape[-1]} elsewhere; make it at most 2 GiB or more than 4 GiB"
        )
    return reasons


def _needs_words(pool):
    """Whether offsets of bytes would overflow: Pallas counts them in 32 bits with a sign, up to 4 GiB."""
    return pool.dtype.itemsize == 1 and 2 * GIB < pool.size <= 4 * GIB


def _pieces(head_dim, half, interleaved):
    """What a row is loaded and stored in: where each piece begins, and its number of columns."""
    pieces = [(0, 2 * half)] if interleaved else [(0, half), (half, half)]
    return [piece for piece in [*pieces, (2 * half, head_dim - 2 * half)] if piece[1]]


def block_sizes(tokens, heads, kv_heads, head_dim, gpu):
    """Rows a program and warps, where the table is silent."""
    width = pl.next_power_of_2(head_dim)
    cores = 1 if gpu is None else gpu.cores
    rows = max(1, tokens * (heads + 2 * kv_heads) // (PROGRAMS_PER_CORE * cores))
    rows = min(1 << (rows.bit_length() - 1), max(1, TILE // width))
    return {"rows": rows, "num_warps": min(4, max(1, rows * width // (TILE // 4)))}


def rotary_page_write(
    qkv,
    key_pages,
    value_pages,
    page,
    offset,
    *,
    cos,
    sin,
    interleaved,
    q_norm,
    k_norm,
    norm_eps,
    norm_offset,
    key_scales,
    value_scales,
    q_dtype,
    config=None,
):
    """See `api.rotary_page_write`; `config` has `rows` (a power of two) and `num_warps`, default tuned or derived."""
    tokens, all_heads, head_dim = qkv.shape[-3:]
    kv_heads = key_pages.shape[1]
    heads = all_heads - 2 * kv_heads
    gpu = dispatch.current_gpu()
    config = config or (
        dispatch.tuned(
            OP,
            gpu,
            tokens=pl.next_power_of_2(tokens),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=str(qkv.dtype),
            page_dtype=str(key_pages.dtype),
        )
        or block_sizes(tokens, heads, kv_heads, head_dim, gpu)
    )
    # A power of two that divides both counts of heads: then a block never holds two parts, and none of it is wasted.
    common = math.gcd(heads, kv_heads)
    heads_per_block = min(config["rows"], common & -common)
    tokens_per_block = min(config["rows"] // heads_per_block, pl.next_power_of_2(tokens))

    inputs = {"qkv": qkv, "page": page, "offset": offset, "cos": cos, "sin": sin, "q_norm": q_norm, "k_norm": k_norm}
    pools = {
        "key_pages": key_pages,
        "value_pages": value_pages,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }
    inputs, pools = ({name: x for name, x in some.items() if x is not None} for some in (inputs, pools))
    stored = key_pages.dtype
    if _needs_words(key_pages):
        pools |= {name: _as_words(pools[name]) for name in ("key_pages", "value_pages")}
    out_shape = [jax.ShapeDtypeStruct((tokens, heads, head_dim), q_dtype)]
    out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools.values()]
    q, *pools_out = triton_call(
        functools.partial(
            _kernel,
            stored=stored,
            names=(*inputs, *(f"old_{name}" for name in pools), "q", *pools),
            heads_per_block=heads_per_block,
            tokens_per_block=tokens_per_block,
            interleaved=interleaved,
            norm_eps=norm_eps,
            norm_offset=norm_offset,
        ),
        *inputs.values(),
        *pools.values(),
        out_shape=out_shape,
        grid=(pl.cdiv(tokens, tokens_per_block), all_heads // heads_per_block),
        name=OP,
        num_warps=config["num_warps"],
        num_stages=1,
        input_output_aliases={len(inputs) + i: 1 + i for i in range(len(pools))},
    )
    written = dict(zip(pools, pools_out, strict=True))
    for name in ("key_pages", "value_pages"):
        if written[name].dtype != stored:
            written[name] = jax.lax.bitcast_convert_type(written[name], stored).reshape(key_pages.shape)
    return q, *(written.get(name) for name in ("key_pages", "value_pages", "key_scales", "value_scales"))


def _as_words(pool):
    return jax.lax.bitcast_convert_type(pool.reshape(*pool.shape[:-1], -1, BYTES), jnp.int32)


def _kernel(*all_refs, stored, names, heads_per_block, tokens_per_block, interleaved, norm_eps, norm_offset):
    refs = dict(zip(names, all_refs, strict=True))
    *parts, tokens, _, head_dim = refs["qkv"].shape
    num_pages, kv_heads, _, _ = refs["key_pages"].shape
    heads = refs["q"].shape[1]

    rows = jnp.arange(tokens_per_block * heads_per_block)
    token = pl.program_id(0) * tokens_per_block + rows // heads_per_block
    first_head = pl.program_id(1) * heads_per_block
    head = first_head + rows % heads_per_block
    is_token = token < tokens

    def columns(piece, valid):
        """The columns of a piece as an index, and the mask of a tile whose rows are `valid`."""
        start, count = piece
        lane = jnp.arange(pl.next_power_of_2(count))
        return start + lane[None, :], valid[:, None] & (lane < count)[None, :]

    def load(ref, *index, mask):
        return pltriton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    def load_qkv(cols, mask):
        at = (token[:, None], head[:, None], cols)
        if not parts:
            return load(refs["qkv"], *at, mask=mask)
        part = jnp.zeros(mask.shape, jnp.int32)
        return functools.reduce(jnp.add, [load(refs["qkv"], part + i, *at, mask=mask) for i in range(parts[0])])

    def load_row(weight, half):
        """The rows in float32, normalized and rotated: tiles, and where each begins and ends as (start, count)."""
        pieces = _pieces(head_dim, half, interleaved)
        at = [columns(piece, is_token) for piece in pieces]
        tiles = [load_qkv(*each) for each in at]
        if weight is not None:
            mean = sum(jnp.sum(tile * tile, axis=1) for tile in tiles) / head_dim
            factor = jax.lax.rsqrt(mean + norm_eps)[:, None]
            tiles = [
                tile * factor * (load(weight, jnp.broadcast_to(cols, tile.shape), mask=mask) + norm_offset)
                for tile, (cols, mask) in zip(tiles, at, strict=True)
            ]
        if half:
            lane, mask = columns((0, half), is_token)
            cos, sin = (load(refs[name], token[:, None], lane, mask=mask) for name in ("cos", "sin"))
            first, second, *rest = [*_unzip(tiles[0]), *tiles[1:]] if interleaved else tiles
            first, second = first * cos - second * sin, second * cos + first * sin
            tiles = [_zip(first, second), *rest] if interleaved else [first, second, *rest]
        return zip(pieces, tiles, strict=True)

    def write(part, begin, row):
        """Put rows where the tokens' pages say, as codes and scales if the pages have scales."""
        pool, scales = refs[f"{part}_pages"], refs.get(f"{part}_scales")
        page = pltriton.load(refs["page"].at[token], mask=is_token, other=-1)
        offset = pltriton.load(refs["offset"].at[token], mask=is_token, other=0)
        is_real = (page >= 0) & (page < num_pages)
        page = jnp.where(is_real, page, num_pages)  # interpreted, a masked store to a negative index would wrap round
        if scales is not None:
            pieces, tiles = zip(*row, strict=True)
            highest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(tile), axis=1) for tile in tiles])
            scale = jnp.maximum(highest * (1 / largest(stored)), TINY)
            pltriton.store(scales.at[page, head - begin, offset], scale, mask=is_real)
            factor = reciprocal(scale)[:, None]
            row = zip(pieces, [_encode(tile * factor, stored) for tile in tiles], strict=True)
        for piece, tile in row:
            if pool.dtype != stored:
                piece, tile = [size // BYTES for size in piece], _words(tile)
            cols, mask = columns(piece, is_real)
            at = pool.at[page[:, None], (head - begin)[:, None], offset[:, None], cols]
            pltriton.store(at, tile.astype(pool.dtype), mask=mask)

    half = refs["cos"].shape[1] if "cos" in refs else 0

    @pl.when(first_head < heads)
    def _():
        for piece, tile in load_row(refs.get("q_norm"), half):
            cols, mask = columns(piece, is_token)
            pltriton.store(refs["q"].at[token[:, None], head[:, None], cols], tile.astype(refs["q"].dtype), mask=mask)

    @pl.when((first_head >= heads) & (first_head < heads + kv_heads))
    def _():
        write("key", heads, load_row(refs.get("k_norm"), half))

    @pl.when(first_head >= heads + kv_heads)
    def _():
        write("value", heads + kv_heads, load_row(None, 0))


def _unzip(x):
    """The even and the odd columns of a tile."""
    return [part.reshape(x.shape[0], -1) for part in jnp.split(x.reshape(x.shape[0], -1, 2), 2, axis=-1)]


def _zip(even, odd):
    return jnp.concatenate([even[..., None], odd[..., None]], axis=-1).reshape(even.shape[0], -1)


def _words(tile):
    """Four columns of bytes a word, the first one lowest."""
    words = jax.lax.bitcast_convert_type(tile, jnp.int8).astype(jnp.int32) & 0xFF
    for shift in (8, 16):
        even, odd = _unzip(words)
        words = even | odd << shift
    return words


def _encode(x, dtype):
    """Float32 to a type of one byte, rounded half to even by integer arithmetic: GPUs before 8.9 can not cast to fp8.

    As `x.astype(dtype)`, of integers rounded first, for finite `x` within the range of the type.
    """
    magnitude = jnp.abs(x)
    if dtype == jnp.int8:
        code = _multiple(magnitude, 1.0)
        return jnp.where(x < 0, -code, code).astype(jnp.int8)
    info = jnp.finfo(dtype)
    dropped = 23 - info.nmant
    # Normal numbers: round at the last bit that is kept (a carry may run into the exponent), then change the bias.
    pattern = bits(magnitude)
    odd = (pattern >> dropped) & 1
    normal = ((pattern + (1 << (dropped - 1)) - 1 + odd) >> dropped) - ((126 + info.minexp) << info.nmant)
    subnormal = _multiple(magnitude, float(info.smallest_subnormal))
    code = jnp.where(magnitude < float(info.smallest_normal), subnormal, normal)
    sign = jnp.where(bits(x) < 0, 0x80, 0)
    return jax.lax.bitcast_convert_type((code | sign).astype(jnp.int8), dtype)


def _multiple(magnitude, step):
    """How often a power of two goes into a float32 of less than `2**23` times its size, rounded half to even.

    The step is the last bit of `2**23 * step`, so adding that rounds. Only magnitudes: were it `a * b` and not
    `abs(a * b)`, a compiler could fuse the sum with the product, which rounds ties by bits that the product lost.
    """
    anchor = np.float32(2.0**23 * step)
    return bits(magnitude + float(anchor)) - int(anchor.view(np.int32))
