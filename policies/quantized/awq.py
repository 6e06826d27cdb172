"""AWQ (arXiv 2306.00978) as AutoAWQ stores it for its GEMM kernel.

`qweight int32[in, out / 8]` holds codes of eight consecutive outputs in a word, in the order 0 2 4 6 1 3 5 7 from its
low bits up; `qzeros int32[groups, out / 8]` holds zero points in that order; `scales` are `float16[groups, out]`. What
inputs are scaled by is in the weights that come before.
"""

from collections.abc import Mapping
from typing import Any

from dsjax.errors import ConfigError
from policies.quantized import packing
from policies.quantized.format import FLOATS, Format, Layout, Parts, QuantizedTensor, with_scales


def check(config: Mapping[str, Any]) -> None:
    """Refuse other bits, and layouts of other kernels."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ConfigError(f"bits={bits} is not read; 4 is")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise ConfigError(f"version={version!r} is not read; 'gemm' is")


def build(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    """The weight `[out, in]`."""
    columns, words = parts.require("qweight", "I32").shape
    out = words * 8
    scales = parts.require("scales", FLOATS)
    count = scales.shape[0]
    parts.require("scales", scales.kind, (count, out))
    parts.require("qzeros", "I32", (count, words))
    if columns % 32:
        raise parts.error(f"its rows of {columns} are not whole runs of 32")

    def arrays(parts: Parts) -> dict[str, Any]:
        words = parts["qweight"].read()

        def codes(rows: slice):
            return packing.of_awq_words(words[:, rows.start // 8 : rows.stop // 8]).T

        return {
            "values": packing.rows_of(out, columns, 4, codes),
            "scales": packing.aligned(parts["scales"].read().T),
            "zeros": packing.aligned(packing.of_awq_words(parts["qzeros"].read()).T),
        }

    to = with_scales("int4_asym", scales.kind, group_size=parts.group(columns, count))
    return QuantizedTensor(parts, (out, columns), to, arrays)


FORMAT = Format(check, (Layout(".qweight", (".qweight", ".qzeros", ".scales"), ".weight", build),))
