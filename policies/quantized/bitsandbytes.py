"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv 2305.14314), and int8 with a scale for each row (arXiv 2208.07339).

Of 4 bits: `weight uint8[out * in / 2, 1]`, the earlier code in the high nibble; `weight.absmax`, a scale for each block
of the flattened weight, itself quantized where `weight.nested_absmax` is there; the rest is JSON in the bytes of
`weight.quant_state.bitsandbytes__nf4`. Of 8: `weight int8[out, in]` and `SCB`, 127 times the scales.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.quantization import scheme
from pallas_kernels.quantized_matmul.formats import NF4
from policies.quantized import packing
from policies.quantized.format import Format, Layout, Parts, QuantizedTensor

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
# FP4 has 0 1/192 2/3 1 1/3 1/2 1/6 1/4, then their negatives: a twelfth of numbers that e2m1 lacks one of and e3m2 has.
_FP4 = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3], np.float32)
_FP4_CODES = np.array([0, 1, 24, 26, 20, 22, 16, 18, 32, 33, 56, 58, 52, 54, 48, 50], np.uint8)


def _four_bits(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    state = next((part for part in _STATES if part in parts), _STATES[0])
    try:
        settings = json.loads(parts[state].read().tobytes())
        out, columns = map(int, settings["shape"])
        kind, block = settings["quant_type"], int(settings["blocksize"])
    except (LookupError, TypeError, ValueError) as error:
        raise parts.error(f"its '{state}' can not be read ({error}); fetch the checkpoint again") from error
    if kind not in ("nf4", "fp4"):
        raise parts.error(f"it is of type {kind!r}, which is not read; nf4 and fp4 are")
    if columns % 32 or parts["weight"].nbytes * 2 != out * columns:
        raise parts.error(f"{parts['weight'].nbytes} bytes are not {[out, columns]} weights in whole runs of 32")
    # Blocks run on from row to row. Groups of the largest size that both rows and blocks are whole numbers of do not.
    group = math.gcd(block, columns)
    parts.require("weight.absmax", ("U8", "F32"), (-(-out * columns // block),))
    base = scheme("nf4" if kind == "nf4" else "fp6", group_size=group, scale_dtype="float32")

    def arrays(parts: Parts) -> dict[str, Any]:
        _check_map(parts, np.asarray(NF4) if kind == "nf4" else np.concatenate([_FP4, -_FP4]) / 12)
        packed = parts["weight"].read().reshape(-1).view(np.uint8).reshape(out, -1)
        scales = _absmax(parts, settings)
        if group != block:
            scales = scales[np.arange(out * columns // group) * group // block]

        def codes(rows: slice) -> np.ndarray:
            found = packing.high_first(packed[rows])
            return found if kind == "nf4" else _FP4_CODES[found]

        return {
            "values": packing.rows_of(out, columns, base.bits, codes),
            "scales": packing.aligned(scales.reshape(out, -1) / np.float32(1 if kind == "nf4" else 12)),
        }

    return QuantizedTensor(parts, (out, columns), base, arrays)


def _check_map(parts: Parts, expected: np.ndarray) -> None:
    found = parts.require("weight.quant_map", "F32", (16,)).read()
    if not np.allclose(found, expected, rtol=0, atol=1e-6):
        raise parts.error(f"its codes stand for other numbers than those of its type: {found.tolist()}")


def _absmax(parts: Parts, settings: Mapping[str, Any]) -> np.ndarray:
    """Scales of the blocks, float32."""
    absmax = parts["weight.absmax"].read()
    if "weight.nested_absmax" not in parts:
        return absmax
    each = parts.require("weight.nested_quant_map", "F32", (256,)).read()[absmax]
    outer = parts.require("weight.nested_absmax", "F32").read()
    blocks = np.arange(len(absmax)) // int(settings["nested_blocksize"])
    return each * outer[blocks] + np.float32(settings["nested_offset"])


def _eight_bits(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    out, columns = parts.require("weight", "I8").shape
    parts.require("SCB", "F32", (out,))

    def arrays(parts: Parts) -> dict[str, Any]:
        if "weight_format" in parts and parts["weight_format"].read().any():
            raise parts.error("its rows are in the order of some GPU; save it with the weight_format 'row'")
        return {
            "values": parts["weight"].read(),
            "scales": packing.aligned(parts["SCB"].read()[:, None] / np.float32(127)),
        }

    return QuantizedTensor(parts, (out, columns), scheme("int8"), arrays)


_FOUR = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FORMAT = Format(
    lambda config: None,
    (
        Layout(
            ".weight.absmax",
            (".weight", *(f".weight.{part}" for part in _FOUR), *(f".{part}" for part in _STATES)),
            ".weight",
            _four_bits,
        ),
        Layout(".SCB", (".weight", ".SCB", ".weight_format"), ".weight", _eight_bits),
    ),
)
