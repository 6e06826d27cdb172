"""How a weight is stored in few bits: `weight = tensor_scale * (scale * (number - zero) + minimum)`.

Two layouts hold the same bits. In `"rows"`, that of checkpoints, a row of the weight is a row of `values`; four-bit
codes are packed in halves of every 32 as GGUF does: byte `j` of 16 holds weight `j` in its low nibble and `j + 16` in
its high one. Six-bit codes take 24 bytes for 32: their low 4 bits like that, then 8 bytes with the high 2 bits of
weights `j, j + 8, j + 16, j + 24` from the low bits up. `"tiles"` is what the kernels read; see `tiles`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RUN = 32  # weights that are packed together in rows

# The quantiles of a normal distribution that QLoRA chose (arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Element:
    """What a code is.

    Attributes:
      bits: of a code.
      dtype: of `values` in rows.
      exponent: bits of the exponent of a small float, else 0.
      mantissa: bits of its mantissa.
    """

    bits: int
    dtype: Any
    exponent: int = 0
    mantissa: int = 0

    @property
    def bias(self) -> int:
        """What the exponent of a small float is above the true one."""
        return 2 ** (self.exponent - 1) - 1


ELEMENTS = {
    "int4": Element(4, jnp.uint8),  # from 0 to 15; a symmetric format subtracts 8
    "int8": Element(8, jnp.int8),
    "uint8": Element(8, jnp.uint8),
    "nf4": Element(4, jnp.uint8),
    "e2m1": Element(4, jnp.uint8, 2, 1),  # the small floats of OCP's microscaling formats have neither inf nor NaN
    "e3m2": Element(6, jnp.uint8, 3, 2),
    "e4m3": Element(8, jnp.float8_e4m3fn, 4, 3),
    "e5m2": Element(8, jnp.float8_e5m2, 5, 2),
}
LAYOUTS = ("rows", "tiles")


@dataclasses.dataclass(frozen=True)
class Format:
    """A stored weight, but for its arrays: static and hashable.

    Attributes:
      element: name in `ELEMENTS`.
      group: consecutive weights of a row that share a scale; `None` for the whole row.
      rows: consecutive rows that share their scales, the last of which may be fewer; `None` for all.
      zero: constant that is subtracted from every integer.
      layout: `"rows"`, or `"tiles"` as `tiles.to_tiles` makes them.
    """

    element: str
    group: int | None = None
    rows: int | None = 1
    zero: int = 0
    layout: str = "rows"

    def __post_init__(self):
        if self.element not in ELEMENTS:
            raise ValueError(f"element {self.element!r} is unknown; there are {sorted(ELEMENTS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown; there are {LAYOUTS}")
        for name in ("group", "rows"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1, or None for all")
        if self.zero and ELEMENTS[self.element].exponent:
            raise ValueError(f"zero={self.zero}: {self.element} is a float, which has its zero where it is")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return ELEMENTS[self.element].bits

    def shape(self, values: Any) -> tuple[int, ...]:
        """Shape `[..., N, K]` of the weight that `values` stand for, from their shape alone."""
        if self.layout == "rows":
            *lead, out, inner = values.shape
            return *lead, out, inner * 8 // self.bits if self.bits < 8 else inner
        *lead, units, out, words = values.shape
        return *lead, out, units * words * 16 // self.bits

    def scales_shape(self, out: int, inner: int) -> tuple[int, int]:
        """The last two axes of scales, zeros and minimums, as they are stored for a weight `[out, inner]`."""
        groups = 1 if self.group is None else math.ceil(inner / self.group)
        blocks = 1 if self.rows is None else math.ceil(out / self.rows)
        return (blocks, groups) if self.layout == "rows" else (groups, blocks)


def unpack(values: jax.Array, bits: int) -> jax.Array:
    """Codes `uint8[..., K]` of four or six bits from packed rows `uint8[..., K * bits / 8]`."""
    inner = values.shape[-1] * 8 // bits
    runs = values.reshape(*values.shape[:-1], -1, RUN * bits // 8)
    low = runs[..., : RUN // 2]
    codes = jnp.concatenate([low & 15, low >> 4], axis=-1)
    if bits == 6:
        high = runs[..., RUN // 2 :]
        codes |= jnp.concatenate([(high >> shift & 3) << 4 for shift in range(0, 8, 2)], axis=-1)
    return codes.reshape(*values.shape[:-1], inner)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """The inverse of `unpack`."""
    runs = codes.reshape(*codes.shape[:-1], -1, RUN)
    low = runs & 15
    packed = low[..., : RUN // 2] | low[..., RUN // 2 :] << 4
    if bits == 6:
        parts = jnp.split(runs >> 4, 4, axis=-1)
        packed = jnp.concatenate([packed, parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6], axis=-1)
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def codes_of(values: jax.Array, element: str) -> jax.Array:
    """Codes `[..., K]` of rows: `uint8`, or the integers of eight bits themselves."""
    kind = ELEMENTS[element]
    if kind.bits < 8:
        return unpack(values, kind.bits)
    return lax.bitcast_convert_type(values, jnp.uint8) if kind.exponent else values


def numbers(codes: jax.Array, element: str) -> jax.Array:
    """What codes stand for before scale and zero, in float32; NaN and infinity of the floats read as large numbers."""
    kind = ELEMENTS[element]
    if element == "nf4":
        return jnp.asarray(np.asarray(NF4, np.float32))[codes]
    if not kind.exponent:
        return codes.astype(jnp.float32)
    magnitude = codes.astype(jnp.int32) & (2 ** (kind.bits - 1) - 1)
    normal = (magnitude << (23 - kind.mantissa)) + ((127 - kind.bias) << 23)
    # By a product, since XLA flushes subnormal numbers to zero on a CPU.
    subnormal = magnitude.astype(jnp.float32) * 2.0 ** (1 - kind.bias - kind.mantissa)
    number = jnp.where(magnitude < 2**kind.mantissa, subnormal, lax.bitcast_convert_type(normal, jnp.float32))
    return jnp.where(codes >> (kind.bits - 1) == 1, -number, number)


def scale_numbers(scales: jax.Array) -> jax.Array:
    """Stored scales as float32; `uint8` is E8M0 of OCP's microscaling formats, `2 ** (scale - 127)`."""
    if scales.dtype != jnp.uint8:
        return scales.astype(jnp.float32)
    # 0 stands for 2 ** -127, which is subnormal.
    bits = scales.astype(jnp.uint32) << 23
    return lax.bitcast_convert_type(jnp.where(scales == 0, jnp.uint32(1 << 22), bits), jnp.float32)


def dequantize_codes(codes, scales, zeros, minimums, tensor_scale, *, format, dtype):
    """The weight `[..., N, K]` in plain `jnp`, computed in float32; scales and the like are those of rows."""
    number = numbers(codes, format.element)
    *lead, out, inner = number.shape
    # By groups, so that a scale is broadcast and not repeated in memory; the last may be cut off.
    groups = scales.shape[-1]
    group = inner if format.group is None else format.group
    number = jnp.pad(number, [(0, 0)] * (number.ndim - 1) + [(0, groups * group - inner)])
    number = number.reshape(*lead, out, groups, group)

    def spread(small):
        small = jnp.asarray(small, jnp.float32)
        rows = out if format.rows is None else format.rows
        return (small if rows == 1 else jnp.repeat(small, rows, axis=-2)[..., :out, :])[..., None]

    if format.zero:
        number -= format.zero
    if zeros is not None:
        number -= spread(zeros)
    number *= spread(scale_numbers(scales))
    if minimums is not None:
        number += spread(minimums)
    weight = number.reshape(*lead, out, groups * group)[..., :inner]
    if tensor_scale is not None:
        weight *= tensor_scale
    return weight.astype(dtype)
