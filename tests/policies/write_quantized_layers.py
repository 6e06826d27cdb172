"""Writes quantized_layers.safetensors: one layer in each format, by the format's own library.

Not part of the tests, which read what it wrote. It ran once, on a CPU, with auto-gptq 0.8.0.dev0, autoawq 0.2.7,
bitsandbytes 0.50.2, compressed-tensors 0.20.0, hqq 0.2.8 and torchao 0.18.0:

    python tests/policies/write_quantized_layers.py tests/policies/quantized_layers.safetensors

Of layer `X` the tensors are called `X.…` as in a checkpoint, and `X` is what the library dequantizes it to.
"""

import sys

import torch
from safetensors.torch import save_file

OUT, IN, GROUP = 32, 64, 32


def layer(weight: torch.Tensor) -> torch.nn.Linear:
    """A linear layer without a bias."""
    made = torch.nn.Linear(*reversed(weight.shape), bias=False)
    made.weight.data = weight.clone()
    return made


def on_a_grid(weight, groups, *, symmetric, bits):
    """A weight rounded to integers, its scales and zero points `[out, groups]`: GPTQ and AWQ store what they get."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = (-part.abs().amax(1), part.abs().amax(1)) if symmetric else (part.amin(1), part.amax(1))
        scales[:, group] = ((high - low) / top).half().float()
        zeros[:, group] = 2 ** (bits - 1) if symmetric else torch.round(-low / scales[:, group])
    scale, zero = scales[:, groups], zeros[:, groups]
    return (torch.clamp(torch.round(weight / scale + zero), 0, top) - zero) * scale, scales, zeros


def gptq(weight):
    """AutoGPTQ, which has no method that dequantizes: what it was given."""
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    plain = torch.arange(IN) // GROUP
    shuffled = plain[torch.randperm(IN)]
    for name, groups, symmetric, bits in (
        ("gptq", plain, True, 4),
        ("gptq_asym_act", shuffled, False, 4),
        ("gptq_8_act", shuffled, True, 8),
    ):
        rounded, scales, zeros = on_a_grid(weight, groups, symmetric=symmetric, bits=bits)
        module = QuantLinear(bits, GROUP, IN, OUT, False, weight_dtype=torch.float16)
        module.pack(layer(rounded), scales, zeros, groups.int())
        parts = {part: getattr(module, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        yield name, rounded, parts | {"scales": module.scales.half(), "g_idx": groups.int()}


def awq(weight):
    """AutoAWQ."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    rounded, scales, zeros = on_a_grid(weight, torch.arange(IN) // GROUP, symmetric=False, bits=4)
    module = WQLinear_GEMM.from_linear(layer(rounded), 4, GROUP, False, scales.t().contiguous(), zeros.t().contiguous())
    parts = {part: getattr(module, part) for part in ("qweight", "qzeros", "scales")}
    yield "awq", dequantize_gemm(*parts.values(), 4, GROUP).t().float(), parts


def bitsandbytes(weight):
    """Of 4 and of 8 bits."""
    from bitsandbytes import functional

    for name, kind, nested in (("bnb_nf4", "nf4", True), ("bnb_nf4_plain", "nf4", False), ("bnb_fp4", "fp4", True)):
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        yield name, functional.dequantize_4bit(codes, state), parts | {"weight": codes}
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    dequantized = functional.int8_vectorwise_dequant(codes, scales)
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "bnb_int8", dequantized.float(), parts


def compressed_tensors(weight):
    """What llm-compressor writes with."""
    from compressed_tensors.compressors.naive_quantized import base as naive
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for name, writer, kind, bits, strategy, symmetric in (
        ("ct_w4a16", Packed, "int", 4, "group", True),
        ("ct_w4a16_asym", Packed, "int", 4, "group", False),
        ("ct_w8a16", Packed, "int", 8, "channel", True),
        ("ct_w8a8", naive.IntQuantizationCompressor, "int", 8, "channel", True),
        ("ct_w8a8_asym", naive.IntQuantizationCompressor, "int", 8, "channel", False),
        ("ct_fp8", naive.FloatQuantizationCompressor, "float", 8, "tensor", True),
        ("ct_fp8_channel", naive.FloatQuantizationCompressor, "float", 8, "channel", True),
    ):
        size = {"group_size": GROUP} if strategy == "group" else {}
        args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **size)
        parts = weight.reshape({"group": (OUT, -1, GROUP), "channel": (OUT, 1, IN), "tensor": (1, -1)}[strategy])
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        state = {"weight": weight.clone(), "weight_scale": scale, "weight_zero_point": zero}
        if strategy == "tensor":
            state |= {"weight_scale": scale[0], "weight_zero_point": zero[0]} if scale.ndim > 1 else {}
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        packed = writer.compress(state, scheme)
        yield name, writer.decompress(dict(packed), scheme)["weight"].float(), packed


def hqq(weight):
    """As transformers saves its modules."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (4, 8):
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        module = HQQLinear(layer(weight), config, compute_dtype=torch.float32, device="cpu")
        yield f"hqq_{bits}", module.dequantize().float(), module.state_dict()


def torchao(weight):
    """As transformers saves its tensors."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    for name, config in (
        ("ao_int8", Int8WeightOnlyConfig(version=2)),
        ("ao_fp8", Float8WeightOnlyConfig()),
        ("ao_int4", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))),
    ):
        module = torch.nn.ModuleDict({"x": layer(weight)})
        quantize_(module, config)
        parts, _ = flatten_tensor_state_dict(module.state_dict())
        dequantized = module["x"].weight.dequantize().float()
        yield name, dequantized, {key.removeprefix("x."): part for key, part in parts.items()}


def main(path: str) -> None:
    """Writes the file."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN) * 0.1
    tensors = {}
    for write in (gptq, awq, bitsandbytes, compressed_tensors, hqq, torchao):
        for name, dequantized, parts in write(weight):
            tensors[name] = dequantized.detach().clone().contiguous()
            tensors |= {f"{name}.{key}": part.detach().clone().contiguous() for key, part in parts.items()}
            print(name, f"{float((dequantized - weight).abs().max()):.4f}")
    save_file(tensors, path)


if __name__ == "__main__":
    main(sys.argv[1])
