"""FP8 with a scale for each 128 x 128 block (DeepSeek-V3, Qwen3-FP8), for each row, or for the whole matrix.

`weight float8_e4m3fn[out, in]` times `weight_scale_inv`, which in spite of its name is the scale. Experts that lie in
one tensor have no `weight` in their names: `experts.down_proj` and `experts.down_proj_scale_inv`.
"""

from collections.abc import Mapping
from typing import Any

from dsjax.errors import ConfigError
from policies.quantized import eight_bits
from policies.quantized.format import Format, Layout, Parts, QuantizedTensor

_BLOCK = (128, 128)


def check(config: Mapping[str, Any]) -> None:
    """Refuse another element, and blocks that are none."""
    if (fmt := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(f"fmt={fmt!r} is not read; 'e4m3' is")
    block = config.get("weight_block_size")
    if block is not None and (len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block)):
        raise ConfigError(f"weight_block_size={block!r} should be rows and columns of a block")


def _blocks(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    return eight_bits.build(parts, "", "_scale_inv", block=config.get("weight_block_size", _BLOCK))


def _rows(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    return eight_bits.build(parts, "weight", "weight_scale")


FORMAT = Format(
    check,
    (
        Layout("_scale_inv", ("", "_scale_inv"), "", _blocks),
        Layout(".weight_scale", (".weight", ".weight_scale"), ".weight", _rows),
    ),
    unused=(".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale"),
)
