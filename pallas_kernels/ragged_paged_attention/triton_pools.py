"""Keys and values as the Triton kernels read them out of their pools, those stored in one byte included.

Bytes are read four to a word of 32 bits, and a tile of them is taken apart into four: part `i` has the columns `i`,
`i + 4`, `i + 8`, … of a head. Queries are loaded in the same parts, products are summed over them, and what the values
come to is put together at the end. A tile of bytes would take half as many instructions again, because hardware
transposes nothing smaller than 16 bits on its way to a tensor core; and its offsets would overflow in pools of 2 to 4
GiB, where Pallas counts bytes in 32 bits with a sign.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pltriton
from pallas_kernels.ragged_paged_attention import triton_common as common

BYTES = 4  # of a word


def num_parts(stored):
    """Parts that a tile comes in."""
    return BYTES if stored.itemsize == 1 else 1


def width(head_dim, stored):
    """Columns of all parts together, padding included."""
    return num_parts(stored) * common.padded(head_dim // num_parts(stored))


def columns_of(head_dim, stored):
    """Which columns of a head each part has; those from `head_dim` on are padding."""
    parts = num_parts(stored)
    return [parts * jnp.arange(common.padded(head_dim // parts)) + i for i in range(parts)]


def interleaved(parts):
    """The tile that parts were taken from; a single one is the tile itself."""
    if len(parts) == 1:
        return parts[0]
    return _alternating(_alternating(parts[0], parts[2]), _alternating(parts[1], parts[3]))


def _alternating(a, b):
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1).reshape(a.shape[0], -1)


def views(pages, scales):
    """Keys, values and their scales as kernels take them: one row a key of a head, of words if they have one byte."""
    rows = {}
    for name, pool, scale in zip(("key", "value"), pages, scales, strict=True):
        row = pool.reshape(-1, pool.shape[3])
        if num_parts(pool.dtype) > 1:
            row = lax.bitcast_convert_type(row.reshape(len(row), -1, BYTES), jnp.int32)
        rows[f"{name}s"] = row
        rows[f"{name}_scales"] = None if scale is None else scale.reshape(-1)
    return rows


def load(refs, rows, head_dim, visible, dtype, features, whole=False):
    """Tiles of keys and of values, each in parts and with its scales.

    Args:
      refs: the kernel's, with those of `views`.
      rows: from `common.rows_of_step`.
      head_dim: columns of the pools.
      visible: which rows are read at all, or `None` for all; the others are 0.
      dtype: of the tiles.
      features: for what is stored, and what the GPU can convert.
      whole: whether parts are put together to one: a product of few large tiles is what `wgmma` is fast at.

    Returns:
      Twice the parts, `[rows, .]` each, and for quantized pools `[rows]`, else `None`.
    """
    parts = num_parts(features.stored)
    columns = jnp.arange(common.padded(head_dim // parts))
    mask = None if visible is None else visible[:, None]
    if head_dim // parts < len(columns):
        inside = (columns < head_dim // parts)[None, :]
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (rows.shape[0], len(columns)))

    def pool(name):
        tile = common.load(refs[f"{name}s"].at[rows[:, None], columns[None, :]], mask)
        scales = refs.get(f"{name}_scales")
        if scales is None:
            return [tile], None
        tiles = [_unpacked(tile, i, dtype, features) for i in range(parts)]
        if whole:
            tiles = [interleaved(tiles)]
        return tiles, common.load(scales.at[rows], visible)

    return pool("key"), pool("value")


def _unpacked(words, index, dtype, features):
    """One byte of each word in the dtype of the product, before its scale."""
    if features.capability is None or dtype == jnp.float32:
        codes = lax.bitcast_convert_type((words >> 8 * index).astype(jnp.int8), features.stored)
        return _converted(codes, dtype, features)
    (tile,) = pltriton.elementwise_inline_asm(
        assembly(index, features.stored, dtype),
        args=[words],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)],
    )
    return tile


def _converted(tile, dtype, features):
    if tile.dtype != jnp.float8_e4m3fn:
        return tile.astype(dtype)
    if features.capability is None or features.capability >= (8, 9):
        return tile.astype(jnp.float16).astype(dtype)
    # Sign and the seven other bits, moved to where float16 has them: 2 ** 8 too small for the difference in bias.
    bits = lax.bitcast_convert_type(tile, jnp.int8).astype(jnp.int16)
    half = lax.bitcast_convert_type((bits << 7) & jnp.int16(-0x4080), jnp.float16)
    return (half * jnp.float16(256)).astype(dtype)


def assembly(index, stored, dtype):
    """PTX that makes two numbers of 16 bits out of byte `index` of two words, for compute capability 8.0 and newer.

    An integer's bits become the last ones of 128 to 255 in bfloat16, of 1024 to 1279 in float16, from which a constant
    is taken away. Those of a small float are moved to where the larger type has them, and a factor makes up for the
    difference in bias: exact for all but NaN, numbers below the smallest normal one included.
    """
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    # The byte goes into the lower half of 16 bits or, of a float, into the upper one.
    picked = (index | (4 + index) << 8) << (0 if stored == jnp.int8 else 4)
    code = f"prmt.b32 t, $1, $2, {picked:#x};"
    if stored == jnp.int8 and dtype == jnp.bfloat16:
        # 128 + the lower seven bits, less 128, and 128 more where the sign is set.
        code += "lop3.b32 u, t, 0x00800080, 0xC300C300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;"  # a & b | c
        code += "mov.b32 f, 0x3F803F80;"
    elif stored == jnp.int8:
        # 1024 + 128 + the integer, less 1152.
        code += "lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A; mov.b32 u, 0xE480E480; mov.b32 f, 0x3C003C00;"
    else:
        shift, mask, factor = _MOVES[stored, jnp.dtype(dtype)]
        code += f"shr.u32 u, t, {shift}; and.b32 u, u, {mask:#x}; lop3.b32 t, t, 0x80008000, u, 0xEA;"
        code += f"mov.b32 u, 0x80008000; mov.b32 f, {factor:#x};"
    return f"{{.reg .b32 t, u, f; {code} fma.rn.{kind} $0, t, f, u;}}"


# How far to the right the bits of a small float go, where they then are, and the power of two that is missing, the last
# two for each half of a word.
_MOVES = {
    (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)): (4, 0x07F007F0, 0x7B807B80),
    (jnp.dtype(jnp.float8_e5m2), jnp.dtype(jnp.bfloat16)): (3, 0x0FE00FE0, 0x77807780),
    (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float16)): (1, 0x3F803F80, 0x5C005C00),
    (jnp.dtype(jnp.float8_e5m2), jnp.dtype(jnp.float16)): (0, 0x7F007F00, 0x3C003C00),
}
