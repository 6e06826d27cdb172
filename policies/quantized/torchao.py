"""torchao's int8 and float8 weights as transformers saves them in safetensors.

The arrays of a tensor `weight` are `_weight_qdata` with the codes, `_weight_scale` and, of integers,
`_weight_zero_point int8`. Integers of fewer bits have bytes of their own too.
"""

from collections.abc import Mapping
from typing import Any

from policies.quantized import eight_bits
from policies.quantized.format import Format, Layout, Parts, QuantizedTensor


def build(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    """The weight `[out, in]`; layouts that are made for one kernel have other dtypes and shapes, and are refused."""
    return eight_bits.build(parts, "_weight_qdata", "_weight_scale", "_weight_zero_point")


_PARTS = ("._weight_qdata", "._weight_scale", "._weight_zero_point")
FORMAT = Format(lambda config: None, (Layout("._weight_qdata", _PARTS, ".weight", build),))
