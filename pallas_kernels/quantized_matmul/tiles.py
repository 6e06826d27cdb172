"""The layout that the kernels read: words of 16 bits, so that two weights of a register are decoded at a time.

A unit is a block of `planes * width` weights of a row. Its weights are cut into planes of `width` consecutive ones, and
word `j` holds weight `j` of every plane: at four bits one word of each `j`, with four planes. So a plane is decoded
into consecutive weights by the same shift and mask for all words, which are those of a matrix of 16-bit elements to the
tensor cores' loads.

    values   uint16[..., K / unit, N, words * width]    a unit of neighbouring rows is one piece of memory
    scales   [..., K / group, N / rows]                 zeros and minimums alike

Both axes of the weight are still axes of the arrays, along which they shard.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul import formats
from pallas_kernels.quantized_matmul.formats import ELEMENTS, Format

# Widths of a plane by bits, the best first: the tensor cores take 16 weights at a time. At six bits a unit has eight
# planes, and the rows of the input that go with wide ones would take too much shared memory.
WIDTHS = {4: (32, 16), 6: (16,), 8: (32, 16)}
_PLANES = {4: 4, 6: 8, 8: 2}
_WORDS = {4: 1, 6: 3, 8: 1}


def planes_of(format: Format) -> int:
    """Planes of a unit."""
    return _PLANES[format.bits]


def _places(element: str) -> list[list[tuple[int, int]]]:
    """For each plane, the word and the bit in it of each bit of a code, the lowest first.

    The small floats are laid out so that most codes come to their place in a bfloat16 by one shift: e2m1 wants its
    sign in bit 15 and the rest in bits 8 to 6, e3m2 its sign and highest bit of the exponent in bits 15 and 9.
    """
    bits = ELEMENTS[element].bits
    if element == "e2m1":
        moved = [[(0, bit - 3 * plane) for bit in (6, 7, 8, 15)] for plane in range(3)]
        return [*moved, [(0, bit) for bit in (10, 11, 13, 14)]]
    if element == "e3m2":
        high = [(9 - plane, 15 - plane) for plane in range(6)] + [(0, 1), (2, 3)]
        return [
            [(plane // 4, 4 * (plane % 4) + bit) for bit in range(4)] + [(2, high[plane][0]), (2, high[plane][1])]
            for plane in range(8)
        ]
    return [[(0, bits * plane + bit) for bit in range(bits)] for plane in range(16 // bits)]


def unit_of(format: Format, width: int) -> int:
    """Weights of a unit."""
    return _PLANES[format.bits] * width


def width_of(format: Format, values: Any) -> int:
    """Weights of a plane of tiled values."""
    return values.shape[-1] // _WORDS[format.bits]


def tile_width(format: Format, inner: int, shards: int = 1) -> int | None:
    """The width of the planes in which a weight can be tiled.

    Args:
      format: of the weight.
      inner: length of its rows.
      shards: parts into which rows will be cut, each of which has to be whole units.

    Returns:
      The widest that fits rows and groups, `None` if there is none.
    """
    for width in WIDTHS[format.bits]:
        unit, group = unit_of(format, width), format.group
        fits = group is None or (group % width == 0 and (group % unit == 0 or unit % group == 0))
        if fits and inner % (unit * shards) == 0:
            return width
    return None


def to_tiles(
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    minimums: jax.Array | None = None,
    *,
    format: Format,
    shards: int = 1,
) -> tuple[Any, ...]:
    """Lays a weight out for the kernels; pure and jittable.

    Args:
      values: in rows, `[..., N, K * bits / 8]`.
      scales: `[..., N / rows, K / group]`.
      zeros: of the shape of `scales`, or `None`.
      minimums: of the shape of `scales`, or `None`.
      format: of these arrays.
      shards: parts into which `K` will be cut.

    Returns:
      Values, scales, zeros, minimums, and their format.

    Raises:
      ValueError: the rows are not whole units or the groups do not fit; `tile_width` tells beforehand.
    """
    _check_layout(format, "rows")
    inner = format.shape(values)[-1]
    width = tile_width(format, inner, shards)
    if width is None:
        raise ValueError(
            f"rows of {inner} in groups of {format.group} can not be tiled at {format.bits} bits"
            f"{f' in {shards} shards' if shards > 1 else ''}: units of {unit_of(format, 16)} must divide them, "
            f"and 16 the group; keep them in rows"
        )
    tiled = dataclasses.replace(format, layout="tiles")
    small = swapped(scales, zeros, minimums)
    return _words(_codes(values, format.element), format.element, width), *small, tiled


def from_tiles(
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    minimums: jax.Array | None = None,
    *,
    format: Format,
) -> tuple[Any, ...]:
    """The inverse of `to_tiles`."""
    _check_layout(format, "tiles")
    rows = dataclasses.replace(format, layout="rows")
    small = swapped(scales, zeros, minimums)
    codes = codes_of(values, format)
    if format.bits < 8:
        return formats.pack(codes, format.bits), *small, rows
    return lax.bitcast_convert_type(codes, ELEMENTS[format.element].dtype), *small, rows


def swapped(*small: Any) -> Any:
    """Scales and the like of rows as those of tiles, and back; `None` where there are none."""
    return [None if each is None else jnp.swapaxes(each, -1, -2) for each in small]


def codes_of(values: jax.Array, format: Format) -> jax.Array:
    """Codes `[..., N, K]` of tiled values, as `formats.codes_of` gives those of rows."""
    words = split_words(values, format)
    planes = [move(words, format.element, plane, range(format.bits)) for plane in range(planes_of(format))]
    codes = join_planes(planes).astype(jnp.uint8)
    if format.element == "uint8":
        codes ^= 128
    return lax.bitcast_convert_type(codes, jnp.int8) if format.element == "int8" else codes


def _check_layout(format, layout):
    if format.layout != layout:
        raise ValueError(f"the layout is {format.layout!r}, not {layout!r}")


def _codes(values, element):
    if ELEMENTS[element].bits < 8:
        return formats.unpack(values, ELEMENTS[element].bits)
    # Unsigned integers are kept less 128, as signed ones: those are decoded exactly in 8 bits of mantissa.
    return lax.bitcast_convert_type(values, jnp.uint8) ^ (128 if element == "uint8" else 0)


def _words(codes, element, width):
    places = _places(element)
    *lead, out, inner = codes.shape
    codes = codes.astype(jnp.uint16).reshape(*lead, out, inner // (len(places) * width), len(places), width)
    words = [jnp.zeros((*codes.shape[:-2], width), jnp.uint16) for _ in range(_WORDS[ELEMENTS[element].bits])]
    for plane, bits in enumerate(places):
        for bit, (word, place) in enumerate(bits):
            words[word] |= (codes[..., plane, :] >> bit & 1) << place
    return jnp.swapaxes(jnp.concatenate(words, axis=-1), -2, -3)


def split_words(values: jax.Array, format: Format) -> list[jax.Array]:
    """Words `[..., width]` of a unit's `[..., words * width]`: one, or three at six bits."""
    return jnp.split(values, _WORDS[format.bits], axis=-1)


def join_planes(planes: list[jax.Array]) -> jax.Array:
    """Planes `[..., K / unit, N, width]` as rows `[..., N, K]`."""
    joined = jnp.swapaxes(jnp.stack(planes, axis=-2), -3, -4)
    return joined.reshape(*joined.shape[:-3], -1)


def terms_of(element: str, plane: int, targets: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """How the bits of a plane's codes are moved to where they are wanted.

    Args:
      element: of the codes.
      plane: which one.
      targets: where each bit of a code shall be, from the lowest; `None` for bits that are not wanted.

    Returns:
      For each piece that moves as one: the word, the shift to the right (to the left, if negative), and the mask after
      it.
    """
    masks: dict[tuple[int, int], int] = {}
    for (word, place), target in zip(_places(element)[plane], targets, strict=True):
        if target is not None:
            key = word, place - target
            masks[key] = masks.get(key, 0) | 1 << target
    return [(word, shift, mask) for (word, shift), mask in masks.items()]


def move(
    words: Sequence[jax.Array], element: str, plane: int, targets: Sequence[int | None], constant: int = 0
) -> jax.Array:
    """Codes of a plane with their bits where they are wanted, and other bits set: `uint16` of the shape of a word."""
    out = jnp.full(words[0].shape, constant, jnp.uint16)
    for word, shift, mask in terms_of(element, plane, targets):
        moved = words[word] >> shift if shift >= 0 else words[word] << -shift
        out |= moved & mask
    return out
