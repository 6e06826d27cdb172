"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it.

`qweight int32[in * bits / 32, out]` holds codes of consecutive inputs in a word, `scales float16[groups, out]`,
`qzeros int32[groups, out * bits / 32]` zero points of consecutive outputs, less one but in the format `gptq_v2`, and
`g_idx int32[in]` the group of each input: with act-order they are not side by side.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.errors import ConfigError
from policies.quantized import packing
from policies.quantized.format import FLOATS, Format, Layout, Parts, QuantizedTensor, with_scales

_FORMATS = ("gptq", "gptq_v2")


def check(config: Mapping[str, Any]) -> None:
    """Refuse other bits, and layouts of some kernel."""
    if config.get("bits") not in (4, 8):
        raise ConfigError(f"bits={config.get('bits')} is not read; 4 and 8 are")
    if _format(config) not in _FORMATS:
        raise ConfigError(f"checkpoint_format={_format(config)!r} is not read; {' and '.join(_FORMATS)} are")
    if any("bits" in change for change in (config.get("dynamic") or {}).values()):
        raise ConfigError("dynamic changes the bits of some modules, which is not read; the same for all is")


def _format(config: Mapping[str, Any]) -> str:
    return config.get("checkpoint_format") or str(config.get("quant_method"))


def build(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    """The weight `[out, in]`, its columns by group."""
    bits: int = config["bits"]
    words, out = parts.require("qweight", "I32").shape
    columns = words * 32 // bits
    scales = parts.require("scales", FLOATS)
    count = scales.shape[0]
    group = parts.group(columns, count)
    parts.require("scales", scales.kind, (count, out))
    parts.require("qzeros", "I32", (count, out * bits // 32))
    if columns % 32 or out * bits % 32:
        raise parts.error(f"of shape {[out, columns]} it is not whole runs of 32")
    symmetric = config.get("sym", True)
    name = f"int{bits}" if symmetric else f"int{bits}_asym"
    to = with_scales(name, scales.kind, group_size=group)
    offset = 0 if _format(config) == "gptq_v2" else 1

    def arrays(parts: Parts) -> dict[str, Any]:
        order = packing.permutation_of(parts, "g_idx", columns, group) if "g_idx" in parts else None
        zeros = packing.of_words(parts["qzeros"].read(), bits) + np.uint8(offset)
        zeros &= np.uint8(2**bits - 1)
        words = parts["qweight"].read()
        values = packing.rows_of(out, columns, bits, lambda rows: packing.of_words(words[:, rows].T, bits), order)
        made = {"values": values, "scales": packing.aligned(parts["scales"].read().T), "permutation": order}
        if not symmetric:
            return made | {"zeros": packing.aligned(zeros.T)}
        middle = 2 ** (bits - 1)
        if not (zeros == middle).all():
            raise parts.error(
                f"its zero points are not all {middle}, although quantization_config says sym=true and "
                f"checkpoint_format={_format(config)}; correct what is wrong of these"
            )
        return made | {"values": values if bits == 4 else packing.signed(values)}

    return QuantizedTensor(parts, (out, columns), to, arrays)


FORMAT = Format(check, (Layout(".qweight", (".qweight", ".qzeros", ".scales", ".g_idx"), ".weight", build),), bias=True)
