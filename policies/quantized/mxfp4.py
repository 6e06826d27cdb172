"""MXFP4 (OCP Microscaling) as gpt-oss stores its experts.

`X_blocks uint8[experts, out, in / 32, 16]` holds two codes in a byte, the earlier one in the low nibble, and `X_scales
uint8[experts, out, in / 32]` exponents of two above -127. Plain checkpoints have `X` as `[experts, in, out]`.
"""

from collections.abc import Mapping
from typing import Any

from policies.quantized import packing
from policies.quantized.format import Format, Layout, Parts, QuantizedTensor, with_scales


def build(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    """The weight `[experts, out, in]`."""
    *lead, out, runs, _ = shape = parts.require("_blocks", "U8").shape
    parts.require("_blocks", "U8", (*shape[:-1], 16))
    parts.require("_scales", "U8", shape[:-1])

    def arrays(parts: Parts) -> dict[str, Any]:
        blocks = parts["_blocks"].read().reshape(-1, runs * 16)
        values = packing.rows_of(len(blocks), runs * 32, 4, lambda rows: packing.low_first(blocks[rows]))
        return {"values": values.reshape(*lead, out, runs * 16), "scales": parts["_scales"].read()}

    return QuantizedTensor(parts, (*lead, out, runs * 32), with_scales("mxfp4", "U8"), arrays, turned=True)


FORMAT = Format(lambda config: None, (Layout("_blocks", ("_blocks", "_scales"), "", build),))
