"""HQQ (half-quadratic quantization, Mobius Labs) as transformers saves it.

`W_q` holds codes of groups of inputs, `[out * in / group, group]`; of 4 bits, the first half of the rows lies in the
high nibbles and the second in the low ones. `scale` and the floating `zero` are `[out * in / group, 1]`. Numbers and
names beside them are tensors too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.errors import ConfigError
from policies.quantized import packing
from policies.quantized.format import FLOATS, Format, Layout, Parts, QuantizedTensor, with_scales

_NUMBERS = ("nbits", "group_size", "axis", "shape", "view_as_float", "channel_wise")
_UNREAD = (
    *("packing", "unpack_view_dtype", "compute_dtype", "quant_scale", "quant_zero", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "optimize", "round_zero"),
)


def check(config: Mapping[str, Any]) -> None:
    """Refuse other bits, and groups along the outputs."""
    for one in _settings(config):
        if one.get("nbits", 4) not in (4, 8):
            raise ConfigError(f"nbits={one['nbits']} is not read; 4 and 8 are")
        if one.get("axis", 1) != 1:
            raise ConfigError(f"axis={one['axis']} is not read; 1, groups along the inputs, is")


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Settings for all modules, or for each of several kinds."""
    given = config.get("quant_config") or {}
    each = [given, *given.values()]
    return [one["weight_quant_params"] for one in each if isinstance(one, dict) and "weight_quant_params" in one]


def build(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    """The weight `[out, in]`."""

    def number(name: str) -> int:
        return int(parts[name].read().reshape(-1)[0])

    bits = number("nbits")
    out, columns = map(int, parts["shape"].read())
    scales = parts.require("scale", FLOATS)
    count = int(np.prod(scales.shape))
    if bits not in (4, 8) or number("axis") != 1:
        raise parts.error(f"it has {bits} bits and groups along axis {number('axis')}; 4 or 8, and 1, are read")
    if columns % 32 or out % 2 or count % out or parts["W_q"].nbytes * 8 != out * columns * bits:
        raise parts.error(f"{parts['W_q'].nbytes} bytes and {count} scales do not fit {[out, columns]}")
    group = parts.group(columns, count // out)
    parts.require("zero", FLOATS, scales.shape)

    def arrays(parts: Parts) -> dict[str, Any]:
        stored = parts["W_q"].read().reshape(-1).view(np.uint8).reshape(-1, columns)

        def codes(rows: slice) -> np.ndarray:
            numbers = np.arange(rows.start, rows.stop)
            some = stored[numbers % len(stored)]
            return np.where((numbers < len(stored))[:, None], some >> 4, some & 15)

        return {
            "values": stored if bits == 8 else packing.rows_of(out, columns, 4, codes),
            "scales": packing.aligned(parts["scale"].read().reshape(out, -1)),
            "zeros": packing.aligned(parts["zero"].read().reshape(out, -1)),
        }

    to = with_scales(f"int{bits}_asym", scales.kind, group_size=group)
    return QuantizedTensor(parts, (out, columns), to, arrays)


_PARTS = tuple(f".{part}" for part in ("W_q", "scale", "zero", *_NUMBERS, *_UNREAD))
FORMAT = Format(check, (Layout(".W_q", _PARTS, ".weight", build),))
