"""Weights whose codes are numbers of 8 bits, which several formats store alike."""

import math
from typing import Any

import numpy as np

from dsjax.quantization import Scheme
from policies.ops import Shape
from policies.quantized import packing
from policies.quantized.format import FLOATS, Parts, QuantizedTensor, with_scales

_ELEMENTS = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2", "I8": "int8"}


def build(parts: Parts, weight: str, scale: str, zero: str = "", block: Any = None) -> QuantizedTensor:
    """A weight with int8 or float8 codes, whose scales say by their shape what they are for.

    Args:
      parts: of the weight.
      weight: the part with the codes.
      scale: the part with the scales.
      zero: the part with zero points, where there is one; those of symmetric weights are zero.
      block: rows and columns that share a scale, if they do.
    """
    codes, scales = parts.require(weight, tuple(_ELEMENTS)), parts.require(scale, (*FLOATS, "F8_E8M0"))
    shared = sharing(parts, scale, codes.shape, block)
    if zero in parts and codes.kind == "I8" and parts.require(zero, "I8").read().any():
        return _with_zeros(parts, weight, scale, zero, with_scales("int8_asym", scales.kind, **shared))
    to = with_scales(_ELEMENTS[codes.kind], scales.kind, **shared)

    def arrays(parts: Parts) -> dict[str, Any]:
        return {"values": parts[weight].read(), "scales": small(parts[scale].read(), to, codes.shape)}

    return QuantizedTensor(parts, codes.shape, to, arrays)


def _with_zeros(parts: Parts, weight: str, scale: str, zero: str, to: Scheme) -> QuantizedTensor:
    shape = parts[weight].shape

    def arrays(parts: Parts) -> dict[str, Any]:
        return {
            "values": packing.unsigned(parts[weight].read()),
            "scales": small(parts[scale].read(), to, shape),
            "zeros": small(packing.unsigned(parts[zero].read()), to, shape),
        }

    return QuantizedTensor(parts, shape, to, arrays)


def sharing(parts: Parts, scale: str, shape: Shape, block: Any = None) -> dict[str, Any]:
    """`rows` and `group_size` of the scheme of a weight of this shape, from the shape of its scales.

    Args:
      parts: of the weight.
      scale: the part with the scales.
      shape: of the weight.
      block: rows and columns that share a scale, if they do.

    Raises:
      CheckpointError: the shapes do not fit each other.
    """
    *lead, out, columns = shape
    given = tuple(parts[scale].shape)
    if block and given == (*lead, -(-out // block[0]), -(-columns // block[1])):
        return {"rows": block[0], "group_size": block[1]}
    if math.prod(given) == math.prod(lead):
        return {"rows": None, "group_size": None}
    if given[: len(lead) + 1] == (*lead, out) and len(given) <= len(shape):
        return {"rows": 1, "group_size": parts.group(columns, math.prod(given[len(lead) + 1 :]))}
    blocks = f" with blocks of {list(block)}" if block else ""
    raise parts.error(f"its '{scale}' has shape {list(given)}, which does not fit {list(shape)}{blocks}")


def small(array: np.ndarray, to: Scheme, shape: Shape) -> np.ndarray:
    """Scales or zero points in the shape that the scheme has for a weight of `shape`; powers of two as bytes."""
    array = array.view(np.uint8) if to.scale_dtype == "e8m0" else array
    return array.reshape(to.parts(shape)["scales"].shape)
