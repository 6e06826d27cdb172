"""Weights in the layouts of quantized checkpoints, packed in numpy from their published descriptions."""

import json

import ml_dtypes
import numpy as np

GROUP = 32
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def integers(weight, bits, symmetric, groups):
    """Codes from 0, scales and zero points `[out, groups]`, and what they stand for."""
    top, count = 2**bits - 1, groups.max() + 1
    parts = [weight[:, groups == group] for group in range(count)]
    low, high = (np.stack([end(part, axis=1) for part in parts], 1) for end in (np.min, np.max))
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else np.clip(np.rint(-low / scales), 1, top)
    scale, zero = scales[:, groups].astype(np.float32), zeros[:, groups]
    codes = np.clip(np.rint(weight / scale + zero), 0, top)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8), ((codes - zero) * scale).astype(np.float32)


def words(codes, axis, bits, order=None):
    """Codes as int32, those of consecutive places along an axis in a word, place `order[i]` at its `i`-th bits."""
    codes, count = np.moveaxis(codes.astype(np.uint32), axis, -1), 32 // bits
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), np.uint32)
    for i, place in enumerate(order or range(count)):
        packed |= codes[..., place::count] << np.uint32(bits * i)
    return np.ascontiguousarray(np.moveaxis(packed.view(np.int32), -1, axis))


def nibbles(codes, first):
    """Codes as bytes, the first of two in the `low` or the `high` nibble."""
    one, two = (0, 1) if first == "low" else (1, 0)
    return codes[..., one::2] | codes[..., two::2] << 4


def gptq(weight, rng, bits=4, symmetric=True, act_order=False, version=1):
    """See `integers`; act-order quantizes columns in another order, and groups go by that."""
    groups = np.arange(weight.shape[1]) // GROUP
    groups = rng.permutation(groups) if act_order else groups
    codes, scales, zeros, dequantized = integers(weight, bits, symmetric, groups)
    tensors = {
        "qweight": words(codes.T, 0, bits),
        "qzeros": words(zeros.T - (version == 1), 1, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": groups.astype(np.int32),
    }
    order = np.argsort(groups, kind="stable")
    parts = {"codes": codes[:, order], "scales": scales, "zeros": None if symmetric else zeros}
    return tensors, dequantized, parts | {"permutation": order if act_order else None}


def awq(weight, rng):
    """Eight outputs in a word, interleaved."""
    codes, scales, zeros, dequantized = integers(weight, 4, False, np.arange(weight.shape[1]) // GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": words(codes.T, 1, 4, order), "qzeros": words(zeros.T, 1, 4, order)}
    parts = {"codes": codes, "scales": scales, "zeros": zeros}
    return tensors | {"scales": np.ascontiguousarray(scales.T)}, dequantized, parts


def fp8(weight, rng, block=(32, 32)):
    """A scale for each block, which may be cut off at the edges."""
    places = [np.arange(size) // side for size, side in zip(weight.shape, block, strict=True)]
    scales = np.zeros([place[-1] + 1 for place in places], np.float32)
    np.maximum.at(scales, np.ix_(*places), np.abs(weight))
    scales /= 448
    each = scales[np.ix_(*places)]
    codes = (weight / each).astype(ml_dtypes.float8_e4m3fn)
    parts = {"codes": codes, "scales": scales}
    return {"weight": codes, "weight_scale_inv": scales}, codes.astype(np.float32) * each, parts


def compressed_tensors(weight, rng, act_order=False):
    """Asymmetric groups, zero points packed along the outputs; with act-order, groups of columns that lie anywhere."""
    groups = np.arange(weight.shape[1]) // GROUP
    groups = rng.permutation(groups) if act_order else groups
    codes, scales, zeros, dequantized = integers(weight, 4, False, groups)
    tensors = {"weight_packed": words(codes, 1, 4), "weight_zero_point": words(zeros, 0, 4)}
    tensors |= {"weight_scale": scales, "weight_shape": np.array(weight.shape)}
    parts = {"codes": codes, "scales": scales, "zeros": zeros}
    if not act_order:
        return tensors, dequantized, parts
    order = np.argsort(groups, kind="stable")
    parts |= {"codes": codes[:, order], "permutation": order}
    return tensors | {"weight_g_idx": groups.astype(np.int32)}, dequantized, parts


def fp8_blocks(weight, rng):
    """As `fp8`, by compressed-tensors' names."""
    tensors, dequantized, parts = fp8(weight, rng)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"]}, dequantized, parts


def mxfp4_rows(weight, rng):
    """As `mxfp4`, by compressed-tensors' names."""
    tensors, dequantized, parts = mxfp4(weight, rng)
    codes = nibbles(parts["codes"], "low")
    return {"weight_packed": codes, "weight_scale": tensors["_scales"]}, dequantized, parts


def w8a8(weight, rng):
    """int8 with a scale for each row, and static scales of the activations, which are not needed."""
    scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(weight / scales).astype(np.int8)
    tensors = {"weight": codes, "weight_scale": scales, "input_scale": np.ones(1, np.float32)}
    return tensors, codes * scales, {"codes": codes, "scales": scales}


def nvfp4(weight, rng):
    """Groups of 16 with scales in float8 that share one in float32."""
    groups = np.abs(weight).reshape(len(weight), -1, 16).max(-1) / 6
    factor = np.float32(448 / groups.max())
    scales = (groups * factor).astype(ml_dtypes.float8_e4m3fn)
    each = (scales.astype(np.float32) / factor).repeat(16, 1)
    codes = np.abs((weight / each)[..., None] - E2M1).argmin(-1).astype(np.uint8)
    tensors = {"weight_packed": nibbles(codes, "low"), "weight_scale": scales, "weight_global_scale": factor[None]}
    return tensors, E2M1[codes] * each, {"codes": codes, "scales": scales}


def nf4(weight, rng):
    """bitsandbytes' blocks of 64 with quantized scales."""
    table = np.asarray(NF4, np.float32)
    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    offset, inner_map = absmax.mean(), np.linspace(-1, 1, 256, dtype=np.float32)
    outer = np.abs(absmax - offset).max(keepdims=True)
    inner = np.abs(((absmax - offset) / outer)[:, None] - inner_map).argmin(1).astype(np.uint8)
    scales = inner_map[inner] * outer + np.float32(offset)
    codes = np.abs((blocks / scales[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    tensors = {
        "weight": nibbles(codes.reshape(-1), "high")[:, None],
        "weight.absmax": inner,
        "weight.quant_map": table,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": inner_map,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    # Groups are as long as rows and blocks have in common.
    size = np.gcd(64, weight.shape[1])
    parts = {"codes": codes.reshape(weight.shape), "scales": scales.repeat(64 // size).reshape(len(weight), -1)}
    return tensors, (table[codes] * scales[:, None]).reshape(weight.shape), parts


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def int8_rows(weight, rng):
    """bitsandbytes' int8."""
    largest = np.abs(weight).max(1).astype(np.float32)
    codes = np.rint(weight * 127 / largest[:, None]).astype(np.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return tensors, codes * (largest / 127)[:, None], {"codes": codes, "scales": (largest / 127)[:, None]}


def hqq(weight, rng):
    """Floating zero points; the first half of the rows in the high nibbles."""
    codes, scales, zeros, _ = integers(weight, 4, False, np.arange(weight.shape[1]) // GROUP)
    zeros = (zeros + rng.uniform(-0.5, 0.5, zeros.shape)).astype(np.float16)
    rows = codes.reshape(-1, GROUP)
    half = len(rows) // 2
    tensors = {"W_q": rows[:half] << 4 | rows[half:], "scale": scales.reshape(-1, 1), "zero": zeros.reshape(-1, 1)}
    numbers = {"nbits": 4, "group_size": GROUP, "axis": 1, "shape": weight.shape, "offload_meta": 0}
    tensors |= {name: np.asarray(number, np.int32) for name, number in numbers.items()}
    scale, zero = (part.astype(np.float32).repeat(GROUP, 1) for part in (scales, zeros))
    return tensors, (codes - zero) * scale, {"codes": codes, "scales": scales, "zeros": zeros}


def torchao(weight, rng):
    """int8, names with underscores."""
    tensors, dequantized, parts = w8a8(weight, rng)
    named = {"_weight_qdata": tensors["weight"], "_weight_scale": tensors["weight_scale"]}
    return named | {"_weight_zero_point": np.zeros((len(weight), 1), np.int8)}, dequantized, parts


def mxfp4(weight, rng):
    """gpt-oss's experts `[E, out, in]`: powers of two for 32 weights."""
    runs = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(runs).max(-1))).astype(np.int32) - 2
    codes = np.abs((runs / 2.0 ** exponents[..., None])[..., None] - E2M1).argmin(-1).astype(np.uint8)
    dequantized = (E2M1[codes] * 2.0 ** exponents[..., None]).reshape(weight.shape).astype(np.float32)
    scales = (exponents + 127).astype(np.uint8)
    parts = {"codes": codes.reshape(weight.shape), "scales": scales}
    return {"_blocks": nibbles(codes, "low"), "_scales": scales}, dequantized, parts
