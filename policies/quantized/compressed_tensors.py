"""compressed-tensors, which llm-compressor writes: what a weight is stored as is told by the tensors that it has.

Packed: `weight_packed int32[out, in * bits / 32]` holds integers, counted from the smallest, from the low bits up;
`weight_shape` the shape, `weight_zero_point` zero points of consecutive outputs in a word, `weight_g_idx` the group of
each input if they are not side by side. Not packed: `weight` in int8 or float8. Of both, `weight_scale` is one for all,
for a row `[out, 1]`, a group `[out, groups]` or a block. FP4: `weight_packed uint8[out, in / 2]`, the earlier code in
the low nibble.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsjax.errors import ConfigError
from policies.quantized import eight_bits, packing
from policies.quantized.format import FLOATS, Format, Layout, Parts, QuantizedTensor, with_scales

_FORMATS = (
    *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
_PARTS = (".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")


def _groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (config.get("config_groups") or {}).values()


def check(config: Mapping[str, Any]) -> None:
    """Refuse what is not about 4 or 8 bits, or about more than storage."""
    groups = list(_groups(config))
    given = [group.get("format") or config.get("format") for group in groups] or [config.get("format")]
    for name in given:
        if name is not None and name not in _FORMATS:
            raise ConfigError(f"format={name!r} is not read; {', '.join(_FORMATS)} are")
    for group in groups:
        bits = (group.get("weights") or {}).get("num_bits", 8)
        if bits not in (4, 8):
            raise ConfigError(f"num_bits={bits} is not read; 4 and 8 are")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ConfigError(f"sparsity_config.format={sparsity!r} is not read; 'dense' is")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ConfigError("transform_config, which turns weights and activations, is not read")


def _packed(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    return (_fp4 if parts["weight_packed"].kind == "U8" else _integers)(parts, config)


def _integers(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    out, words = parts.require("weight_packed", "I32").shape
    rows, columns = map(int, parts.require("weight_shape", ("I64", "I32"), (2,)).read())
    bits = next((bits for bits in (4, 8) if columns * bits == words * 32), None)
    if bits is None or columns % 32 or rows != out:
        raise parts.error(f"'weight_packed' [{out}, {words}] is not one of 4 or 8 bits for {[rows, columns]}")
    scales = parts.require("weight_scale", FLOATS)
    shared = eight_bits.sharing(parts, "weight_scale", (out, columns))
    symmetric = "weight_zero_point" not in parts
    to = with_scales(f"int{bits}" if symmetric else f"int{bits}_asym", scales.kind, **shared)

    def arrays(parts: Parts) -> dict[str, Any]:
        by_group = "weight_g_idx" in parts
        order = packing.permutation_of(parts, "weight_g_idx", columns, to.group_size) if by_group else None
        words = parts["weight_packed"].read()
        values = packing.rows_of(out, columns, bits, lambda rows: packing.of_words(words[rows], bits), order)
        made = {
            "values": packing.signed(values) if symmetric and bits == 8 else values,
            "scales": eight_bits.small(parts["weight_scale"].read(), to, (out, columns)),
            "permutation": order,
        }
        return made if symmetric else made | {"zeros": eight_bits.small(_zeros(parts, bits, out), to, (out, columns))}

    return QuantizedTensor(parts, (out, columns), to, arrays)


def _zeros(parts: Parts, bits: int, out: int) -> np.ndarray:
    """Zero points `uint8[out, groups]` of unsigned codes."""
    zeros = parts.require("weight_zero_point", ("I32", "I8")).read()
    if zeros.dtype == np.int32:
        return packing.aligned(packing.of_words(zeros.T, bits)[:, :out].T)
    return packing.unsigned(zeros, bits)


def _fp4(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    out, packed = parts["weight_packed"].shape
    scales = parts.require("weight_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    name = "nvfp4" if scales.kind == "F8_E4M3" else "mxfp4"
    to = with_scales(name, scales.kind)
    if packed % 16 or tuple(scales.shape) != (out, packed * 2 // (to.group_size or 1)):
        raise parts.error(f"its scales {list(scales.shape)} do not fit {[out, packed * 2]} weights of {name}")

    def arrays(parts: Parts) -> dict[str, Any]:
        codes = parts["weight_packed"].read()
        made: dict[str, Any] = {
            "values": packing.rows_of(out, packed * 2, 4, lambda rows: packing.low_first(codes[rows])),
            "scales": eight_bits.small(parts["weight_scale"].read(), to, (out, packed * 2)),
        }
        if name == "nvfp4":
            # Stored is what the scales were multiplied with.
            made["tensor_scale"] = 1 / parts["weight_global_scale"].read().astype(np.float32).reshape(1, 1)
        return made

    return QuantizedTensor(parts, (out, packed * 2), to, arrays)


def _plain(parts: Parts, config: Mapping[str, Any]) -> QuantizedTensor:
    blocks = [(group.get("weights") or {}).get("block_structure") for group in _groups(config)]
    block = next(filter(None, blocks), None)
    if isinstance(block, str):  # "128x128" in older files
        block = tuple(map(int, block.split("x")))
    return eight_bits.build(parts, "weight", "weight_scale", "weight_zero_point", block)


FORMAT = Format(
    check,
    (
        Layout(".weight_packed", (*_PARTS, ".weight_global_scale"), ".weight", _packed),
        Layout(".weight_scale", _PARTS, ".weight", _plain),
    ),
    unused=(
        *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point"),
        *(".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"),
    ),
)
