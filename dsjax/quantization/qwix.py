"""To and from the array type of `qwix` (github.com/google/qwix), where both have the scheme.

A qwix array has unpacked values of the weight's shape, and scales that repeat along each axis. It knows no scale of
scales, no minimum and no six bits, and nothing about inputs.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.errors import ConfigError
from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.schemes import scheme
from pallas_kernels.quantized_matmul.formats import pack, unpack

# Element, dtype of values in qwix, what they are less than the codes, and the name of the type if it is no dtype.
_TYPES: tuple[tuple[str, Any, int, Any], ...] = (
    ("int8", jnp.int8, 0, None),
    ("uint8", jnp.int8, 128, None),
    ("int4", jnp.int4, 8, None),
    ("e4m3", jnp.float8_e4m3fn, 0, None),
    ("e5m2", jnp.float8_e5m2, 0, None),
    ("nf4", jnp.uint4, 0, "nf4"),
)
_SUPPORTED = "int8, int4, fp8 and nf4 with a scale for rows, groups of whole rows, blocks that divide, or the matrix"


def to_qwix(leaf: QuantizedArray) -> Any:
    """The same weight as a `qwix.QArray` `[..., out, in]`, its scales in their own dtype.

    Raises:
      ConfigError: qwix has no such scheme.
    """
    qwix = importlib.import_module("qwix")

    leaf, to = leaf.in_rows(), leaf.scheme
    types = {one[0]: one[1:] for one in _TYPES}
    cut = to.rows not in (1, None) and (leaf.shape[-2] % to.rows or leaf.shape[-1] % (to.group_size or 1))
    odd = leaf.changes_inputs or leaf.minimums is not None or leaf.tensor_scale is not None or cut
    if to.element not in types or odd:
        raise ConfigError(f"qwix can not hold {leaf}; it can hold {_SUPPORTED}")
    dtype, less, name = types[to.element]
    codes = leaf.values if to.bits == 8 else unpack(leaf.values, to.bits)
    zeros = leaf.zeros
    if zeros is None and less and to.zero != less:
        zeros = jnp.full(leaf.scales.shape, to.zero, jnp.uint8)
    if zeros is not None and not jnp.issubdtype(zeros.dtype, jnp.integer):
        raise ConfigError(f"qwix can not hold {leaf}: its zero points are {zeros.dtype}, those of qwix integers")

    def signed(array: jax.Array) -> jax.Array:
        return (array.astype(jnp.int32) - less if less else array).astype(dtype)

    zero_point = None if zeros is None else signed(zeros)
    return qwix.QArray(qvalue=signed(codes), scale=leaf.scales, zero_point=zero_point, qtype=name)


def from_qwix(array: Any, dtype: Any = None) -> QuantizedArray:
    """A `qwix.QArray` `[..., out, in]` as a leaf; of one that is stored `[in, out]`, give the transpose.

    Args:
      array: with scales that are shared along rows, and for packed values groups of whole runs of 32 weights.
      dtype: what the leaf reads as; default that of the scales.

    Raises:
      ConfigError: dsjax has no such scheme, or the values can not be packed.
    """
    values, scales, zeros = array.qvalue, array.scale, array.zero_point
    kind = array.qtype if isinstance(array.qtype, str) else jnp.dtype(values.dtype)
    *lead, out, columns = values.shape
    scale_dtype = jnp.dtype(scales.dtype).name
    elements = {
        name or jnp.dtype(dtype): (element, less) for element, dtype, less, name in _TYPES if element != "uint8"
    }
    if zeros is not None:
        elements[jnp.dtype(jnp.int8)] = "uint8", 128
    if kind not in elements or scale_dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"{kind} values with {scale_dtype} scales are no scheme here; qwix arrays can be {_SUPPORTED}"
        )
    element, less = elements[kind]
    base = {"e4m3": "fp8_e4m3", "e5m2": "fp8_e5m2", "uint8": "int8"}.get(element, element)
    group, rows = (
        whole // count for whole, count in zip((columns, out), (scales.shape[-1], scales.shape[-2]), strict=True)
    )
    to = scheme(
        base,
        group_size=None if group == columns else group,
        rows=1 if rows == 1 else None if rows == out else rows,
        scale_dtype=scale_dtype,
        **({"symmetric": False} if zeros is not None else {}),
    )
    to.check(values.shape, "the qwix array")

    def unsigned(array: jax.Array) -> jax.Array:
        return (array.astype(jnp.int32) + less).astype(jnp.uint8) if less else array

    codes = unsigned(values)
    shape = (*lead, *scales.shape[-2:])
    return QuantizedArray(
        values=codes if to.bits == 8 else pack(codes.astype(jnp.uint8), to.bits),
        scales=jnp.broadcast_to(scales, shape),
        minimums=None,
        zeros=None if zeros is None else jnp.broadcast_to(unsigned(zeros), shape),
        scheme=to,
        dtype=jnp.dtype(dtype or scales.dtype),
    )
