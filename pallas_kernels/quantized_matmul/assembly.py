"""Pieces of kernels in PTX, where two elements of 16 bits are to be worked on in one register.

Triton unpacks a register into its elements, and works on each alone; LLVM does not put them together again.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.compat import pltriton

_AND_OR = 0xEA  # (a & b) | c
_CHOOSE = 0xCA  # b where a, else c


def move(words: Sequence[jax.Array], terms: Sequence[tuple[int, int, int]], constant: int, dtype: Any) -> jax.Array:
    """As `tiles.move`, by `tiles.terms_of`, with the bits read as `dtype`."""
    used = sorted({word for word, _, _ in terms})
    code, other = [".reg .b32 t;"], str(constant * 0x10001)
    for word, shift, mask in terms:
        operand = f"${1 + used.index(word)}"
        if shift:
            code.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, {operand}, {abs(shift)};")
            operand = "t"
        code.append(f"lop3.b32 $0, {operand}, {mask * 0x10001}, {other}, {_AND_OR};")
        other = "$0"
    (out,) = pltriton.elementwise_inline_asm(
        "{" + " ".join(code) + "}",
        args=[words[word] for word in used],
        constraints=",".join(["=&r", *["r"] * len(used)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words[0].shape, dtype)],
    )
    return out


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """`a * b + c` in float32, rounded once."""
    (out,) = pltriton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return out


def look_up(word: jax.Array, plane: int, table: np.ndarray) -> jax.Array:
    """What a table of 16 numbers of 16 bits has for the code of four bits of a plane, `word >> 4 * plane & 15`.

    A byte permutation looks four codes up at once among eight bytes; the fourth bit of a code chooses between two such.
    """
    pieces = table.view(np.uint8).reshape(16, 2)
    tables = [[int.from_bytes(pieces[i : i + 4, half].tobytes(), "little") for i in (0, 4, 8, 12)] for half in (0, 1)]
    code = [".reg .b32 s, m, k, c, x, y, l, h;"]
    code += [f"shr.b32 x, $2, {4 * plane};" if plane else "mov.b32 x, $2;"]
    code += [f"shr.b32 y, $3, {4 * plane - 4};" if plane else "shl.b32 y, $3, 4;"]
    # Of the words a, b and c, d of two registers: codes a, c, b, d in the lower half.
    code += [f"lop3.b32 s, 0x000f000f, x, y, {_CHOOSE};", "prmt.b32 s, s, 0, 0x4420;"]
    code += ["shr.b32 m, s, 3;", "and.b32 m, m, 0x1111;", "prmt.b32 k, 0xff00, 0, m;", "and.b32 s, s, 0x7777;"]
    for half, (t0, t4, t8, t12) in zip("lh", tables, strict=True):
        code += [f"mov.b32 c, {t4};", f"prmt.b32 x, {t0}, c, s;", f"mov.b32 c, {t12};", f"prmt.b32 y, {t8}, c, s;"]
        code += [f"lop3.b32 {half}, k, y, x, {_CHOOSE};"]
    code += ["prmt.b32 $0, l, h, 0x6240;", "prmt.b32 $1, l, h, 0x7351;"]
    (out,) = pltriton.elementwise_inline_asm(
        "{" + " ".join(code) + "}",
        args=[word],
        constraints="=&r,=&r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(word.shape, table.dtype)],
    )
    return out
