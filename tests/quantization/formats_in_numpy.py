"""The formats of `dsjax.quantization` from their definitions, in numpy and float64."""

import ml_dtypes
import numpy as np

# Numbers by code, for codes that are packed.
NF4 = np.array(
    """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0""".split(),
    np.float64,
)
TABLES = {
    "int4": np.arange(16.0),
    "e2m1": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64),
    "e3m2": np.arange(64, dtype=np.uint8).view(ml_dtypes.float6_e3m2fn).astype(np.float64),
    "nf4": NF4,
    "int8": np.arange(-128.0, 128),
    "uint8": np.arange(256.0),
    "e4m3": np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64),
    "e5m2": np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float64),
}


def unpacked(values, element):
    """Numbers that bytes stand for, weight by weight."""
    values = np.asarray(values)
    if element in ("int8", "uint8", "e4m3", "e5m2"):
        return values.astype(np.float64)
    bits = 6 if element == "e3m2" else 4
    width = 32 * bits // 8
    weights = np.arange(values.shape[-1] // width * 32)
    run, j = weights // 32 * width, weights % 32
    codes = values[..., run + j % 16] >> 4 * (j // 16) & 15
    if bits == 6:
        codes |= (values[..., run + 16 + j % 8] >> 2 * (j // 8) & 3) << 4
    return TABLES[element][codes]


def nearest(numbers, element):
    """The numbers of the format that are nearest to others, ties aside."""
    table = np.unique(TABLES[element][np.isfinite(TABLES[element])])
    at = np.clip(np.searchsorted(table, numbers), 1, len(table) - 1)
    low, high = table[at - 1], table[at]
    return np.where(numbers - low < high - numbers, low, high)


def spread(scales, scheme, shape):
    """Each weight's scale."""
    scales = np.asarray(scales)
    scales = (
        scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 and scheme.scale_dtype == "e8m0" else scales
    )
    scales = scales.astype(np.float64)
    rows, columns = scheme.rows or shape[-2], scheme.group_size or shape[-1]
    return scales.repeat(rows, axis=-2)[..., : shape[-2], :].repeat(columns, axis=-1)[..., : shape[-1]]


def dequantized(leaf):
    """What a leaf without inputs of its own stands for."""
    scheme, scales = leaf.scheme, spread(leaf.scales, leaf.scheme, leaf.shape)
    zeros = scheme.zero if leaf.zeros is None else np.asarray(leaf.zeros).astype(np.float64)
    zeros = zeros if np.ndim(zeros) == 0 else spread(zeros, scheme, leaf.shape)
    weight = (unpacked(leaf.values, scheme.element) - zeros) * scales
    if leaf.tensor_scale is not None:
        weight = weight * np.asarray(leaf.tensor_scale, np.float64)
    return weight if leaf.minimums is None else weight + spread(leaf.minimums, scheme, leaf.shape)


def rounded(weight, scheme):
    """A matrix stored and read back, with scales from the largest magnitude and in full precision."""
    weight = weight.astype(np.float64)
    *lead, out, columns = weight.shape
    rows, group = scheme.rows or out, scheme.group_size or columns
    edges = [(0, 0)] * len(lead) + [(0, -out % rows), (0, -columns % group)]
    padded = np.pad(weight, edges)
    blocks = padded.reshape(*lead, padded.shape[-2] // rows, rows, padded.shape[-1] // group, group)
    axes, table = (-3, -1), TABLES[scheme.element][np.isfinite(TABLES[scheme.element])]
    largest = np.abs(blocks).max(axis=axes, keepdims=True)
    zero = scheme.zero
    if scheme.has_zeros or scheme.has_minimum:
        low, high = blocks.min(axis=axes, keepdims=True), blocks.max(axis=axes, keepdims=True)
        if scheme.has_zeros:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = (high - low) / (table.max() - table.min())
        zero = -low / np.where(scales == 0, 1, scales)
        zero = np.round(zero) if scheme.has_zeros else zero
    elif scheme.element in ("int4", "int8"):
        scales = largest / (2.0 ** (scheme.bits - 1) - 0.5)
    elif scheme.scale_dtype == "e8m0":
        scales = 2.0 ** (np.floor(np.log2(np.where(largest == 0, 1, largest))) - 2)
    else:
        scales = largest / table.max()
    if scheme.has_tensor_scale:
        whole = largest.max() / (448 * 6)
        scales = (scales / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * whole
    numbers = nearest(blocks / np.where(scales == 0, 1, scales) + zero, scheme.element)
    return ((numbers - zero) * scales).reshape(padded.shape)[..., :out, :columns]
