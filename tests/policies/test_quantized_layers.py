"""Layers that the libraries of quantized formats wrote (`write_quantized_layers.py`), and what is refused."""

import functools
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsjax.errors import CheckpointError, ConfigError
from policies.quantized import assemble, check_config
from policies.sources.memory import HeldTensor
from policies.sources.safetensors import read_header

CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": "gptq"},
    "gptq_asym_act": {"quant_method": "gptq", "bits": 4, "sym": False, "desc_act": True},
    "gptq_8_act": {"quant_method": "gptq", "bits": 8, "sym": True, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "bnb": {"quant_method": "bitsandbytes"},
    "ct": {"quant_method": "compressed-tensors"},
    "hqq": {"quant_method": "hqq"},
    "ao": {"quant_method": "torchao"},
}
SCHEMES = {
    "gptq": "int4,scale_dtype=float16",
    "gptq_asym_act": "int4_asym,scale_dtype=float16",
    "gptq_8_act": "int8_g32,scale_dtype=float16",
    "awq": "int4_asym,scale_dtype=float16",
    "bnb_nf4": "nf4,scale_dtype=float32",
    "bnb_nf4_plain": "nf4,scale_dtype=float32",
    "bnb_fp4": "fp6_g64,scale_dtype=float32",  # e2m1 lacks a number of bitsandbytes' FP4
    "bnb_int8": "int8",
    "ct_w4a16": "int4,scale_dtype=float32",
    "ct_w4a16_asym": "int4_asym,scale_dtype=float32",
    "ct_w8a16": "int8",
    "ct_w8a8": "int8",
    "ct_w8a8_asym": "int8_asym",
    "ct_fp8": "fp8_e4m3_tensor",
    "ct_fp8_channel": "fp8_e4m3",
    "hqq_4": "int4_asym,scale_dtype=float32",
    "hqq_8": "int8_asym_g32,scale_dtype=float32",
    "ao_int8": "int8",
    "ao_fp8": "fp8_e4m3",
    "ao_int4": "int8_g32,scale_dtype=float32",  # a byte for each in the file too
}


@functools.cache
def written():
    """The layers in the file."""
    return read_header(Path(__file__).with_name("quantized_layers.safetensors"))


def parts_of(layer):
    """Its tensors in memory, by their names in a checkpoint."""
    return {name: HeldTensor(name, tensor.read()) for name, tensor in written().items() if name.startswith(f"{layer}.")}


def config_of(layer):
    """`quantization_config` of a checkpoint with this layer."""
    return CONFIGS.get(layer) or CONFIGS[layer.split("_")[0]]


def read(tensors, config):
    """The one weight that they make up."""
    (tensor,) = assemble(tensors, config).tensors.values()
    leaf = tensor.read()
    assert leaf.shape == tensor.shape and tensor.kind == leaf.scheme.name.split(",")[0]
    return leaf


@pytest.mark.parametrize("layer", SCHEMES)
def test_layers_of_the_libraries(layer):
    leaf = read(parts_of(layer), config_of(layer))
    expected = written()[layer].read()
    assert leaf.scheme.name == SCHEMES[layer]
    # AutoAWQ dequantizes in float16.
    np.testing.assert_allclose(leaf.dequantize(), expected, rtol=1e-3 if layer == "awq" else 1e-6, atol=1e-7)
    assert set(written()) == {name for layer in SCHEMES for name in (layer, *parts_of(layer))}


def test_blocks_that_run_on_from_row_to_row():
    parts = parts_of("bnb_nf4_plain")
    name = next(name for name in parts if "quant_state" in name)
    state = json.loads(parts[name].read().tobytes()) | {"shape": [64, 32]}  # of rows of 64 weights and blocks of 64
    parts[name] = HeldTensor(name, np.frombuffer(json.dumps(state).encode(), np.uint8))
    leaf = read(parts, config_of("bnb"))
    assert leaf.scheme.group_size == 32
    np.testing.assert_array_equal(leaf.dequantize(), written()["bnb_nf4_plain"].read().reshape(64, 32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "quant_method=aqlm is not supported; these are: gptq, gptq_v2, awq, compressed-tens",
        ),
        ({}, "quant_method=None is not supported"),
        ("gptq", "quantization_config='gptq' should hold an object"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not read; 4 and 8 are"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic changes the bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": [1]}, "a field has a value of the wrong kind"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' is not read; 'gemm' is"),
        ({"quant_method": "awq", "w_bit": 3}, "bits=3 is not read; 4 is"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "format='marlin-24' is not read; dense, pack-q",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 2}}}}, "num_bits=2 is"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "'sparse-24' is not read"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not read"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "should be rows and columns of a block"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3}}}, "nbits=3 is not read"),
        (
            {"quant_method": "hqq", "quant_config": {"q_proj": {"weight_quant_params": {"axis": 0}}}},
            "axis=0 is not read",
        ),
    ],
)
def test_what_is_not_read_is_named(config, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)


def changed(layer, part, array):
    """The tensors of a layer with one replaced."""
    name = f"{layer}.{part}"
    parts = parts_of(layer)
    assert name in parts
    return {key: tensor for key, tensor in parts.items() if key != name} | (
        {} if array is None else {name: HeldTensor(name, array)}
    )


GROUPS = np.arange(64, dtype=np.int32) // 32
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("layer", "part", "array", "message"),
    [
        ("gptq", "qzeros", None, "'gptq.weight': the checkpoint lacks its 'qzeros'"),
        ("gptq", "scales", np.ones((3, 32), np.float16), "rows of 64 weights do not divide into 3 groups"),
        ("gptq", "scales", np.ones((2, 33), np.float16), "its 'scales' has shape [2, 33], not [2, 32]"),
        ("gptq", "qweight", np.ones((8, 32), np.int8), "its 'qweight' is of dtype I8, not I32"),
        (
            "gptq",
            "qzeros",
            np.ones((2, 4), np.int32),
            "its zero points are not all 8, although quantization_config says sym=true",
        ),
        ("gptq", "g_idx", np.minimum(GROUPS * 2, 1)[::-1] * GROUPS, "does not have 32 inputs in every group"),
        ("awq", "qzeros", np.ones((2, 5), np.int32), "its 'qzeros' has shape [2, 5], not [2, 4]"),
        ("bnb_nf4", "weight.quant_map", np.ones(16, np.float32), "its codes stand for other numbers"),
        ("bnb_nf4", "weight.quant_state.bitsandbytes__nf4", np.zeros(4, np.uint8), "can not be read"),
        ("bnb_nf4", "weight", np.zeros((9, 1), np.uint8), "9 bytes are not [32, 64] weights"),
        ("bnb_int8", "weight_format", np.array(2, np.uint8), "in the order of some GPU"),
        ("ct_w4a16", "weight_packed", np.zeros((32, 7), np.int32), "'weight_packed' [32, 7] is not one of 4 or 8 bits"),
        (
            "ct_fp8",
            "weight_scale",
            np.ones((2, 2), np.float32),
            "its 'weight_scale' has shape [2, 2], which does not fit",
        ),
        ("hqq_4", "nbits", np.array(2, np.int32), "it has 2 bits and groups along axis 1"),
        ("ao_int4", "_weight_zero_point", np.ones((32, 2), np.float32), "'_weight_zero_point' is of dtype F32, not I8"),
    ],
)
def test_what_does_not_fit_is_named(layer, part, array, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(changed(layer, part, array), config_of(layer))


def test_tensors_that_are_not_needed_are_left_out():
    weight = HeldTensor("weight", np.ones((32, 32), E4M3))
    tensors = {"a.weight": weight, "a.weight_scale": HeldTensor("scale", np.ones(1, np.float32))}
    tensors |= {name: tensors["a.weight_scale"] for name in ("a.input_scale", "attn.k_scale", "attn.v_scale")}
    tensors |= {"norm.weight": weight}
    assert list(assemble(tensors, {"quant_method": "fp8"}).tensors) == ["a.weight", "norm.weight"]
    assert assemble(tensors, None).tensors == tensors
