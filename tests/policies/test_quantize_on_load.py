"""Quantization on the way from the file to the device, against the gguf package's own numbers."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import dsjax
import policies
from dsjax.errors import ConfigError, ParameterError
from dsjax.params import flatten
from dsjax.quantization import QuantizedArray
from policies import quantizing
from policies.sources import blocks

KINDS = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}
KINDS |= {"q8_0": gguf.GGMLQuantizationType.Q8_0}


@pytest.mark.parametrize("scheme", KINDS)
def test_matrices_are_quantized_as_gguf_does(save_hf, monkeypatch, scheme):
    monkeypatch.setattr(blocks, "_PIECE", 500)
    folder, _ = save_hf("qwen2", dtype=torch.bfloat16)
    plain = flatten(policies.load(folder, dtype="float32"))
    quantized = flatten(policies.load(folder, dtype="bfloat16", quantize=scheme))
    assert plain.keys() == quantized.keys()
    for path, leaf in quantized.items():
        if plain[path].ndim < 2:
            assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16, path
            continue
        assert isinstance(leaf, QuantizedArray) and leaf.scheme.name == scheme and leaf.dtype == jnp.bfloat16, path
        raw = gguf.quantize(np.asarray(plain[path]), KINDS[scheme])
        expected = gguf.dequantize(raw, KINDS[scheme])
        np.testing.assert_allclose(leaf.dequantize(jnp.float32), expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_what_stays_plain(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=37,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    leaves = flatten(policies.load(tmp_path, quantize="q8_0"))
    plain = {path for path, leaf in leaves.items() if not isinstance(leaf, QuantizedArray)}
    norms = {"final_norm.scale", "layers.0.attention_norm.scale", "layers.0.mlp_norm.scale"}
    # Rows of 48 are no whole number of groups of 32, and a router decides by small differences.
    assert plain == norms | {"layers.0.mlp.router.weight", "layers.0.mlp.experts.down.weight"}
    assert leaves["layers.0.mlp.experts.up.weight"].shape == (2, 48, 64)


def test_a_quantized_file_in_another_scheme(write_gguf, gguf_parts):
    path = write_gguf(*gguf_parts(kind=KINDS["q4_1"]))
    kept, again = flatten(policies.load(path, quantize="q4_1")), flatten(policies.load(path, quantize="q8_0"))
    name = "layers.0.mlp.up.weight"
    assert kept[name].scheme.name == "q4_1" and again[name].scheme.name == "q8_0"
    jax.tree.map(np.testing.assert_array_equal, kept[name], flatten(policies.load(path))[name])
    whole = np.asarray(kept[name].dequantize())
    expected = gguf.dequantize(gguf.quantize(whole, KINDS["q8_0"]), KINDS["q8_0"])
    np.testing.assert_allclose(again[name].dequantize(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", ["int4", {"embed": None, "mlp": "fp8", "layers.0.attention.*": "int8_asym"}])
def test_recipes_are_those_of_quantize(save_hf, monkeypatch, recipe):
    """In pieces of some rows as in one."""
    monkeypatch.setattr(quantizing, "_PIECE", 700)
    folder, _ = save_hf("qwen2", dtype=torch.bfloat16)
    expected = flatten(dsjax.quantize(policies.load(folder, dtype="bfloat16"), recipe))
    found = flatten(policies.load(folder, dtype="bfloat16", quantize=recipe))
    assert sum(isinstance(leaf, QuantizedArray) for leaf in found.values()) > 3
    for path, leaf in found.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(expected[path]), path
        jax.tree.map(np.testing.assert_array_equal, leaf, expected[path])


def test_wrong_recipes_are_refused_before_reading(save_hf):
    folder, _ = save_hf("qwen2", dtype=torch.bfloat16)
    next(folder.glob("*.safetensors")).write_bytes(b"never looked at")
    for recipe, fit, message in (
        ({"atention": "int4"}, "nearest", "pattern 'atention' of the recipe matches no leaf; there are: .*attention"),
        ({"norm": "int8"}, "nearest", "asks for 'int8' for leaf .*norm.*which is no matrix"),
        ("int4_g128", "nearest", "groups of 128, which does not divide rows of .*; these would: .*int4"),
        ("int5", "nearest", "quantize='int5' is not supported"),
        ("int4", "best", "fit='best' is unknown; 'nearest' and 'hqq' are known"),
        ({"mlp": "int4", "*": "mxfp4"}, "hqq", "scales of 'mxfp4' are too coarse to be fitted"),
        (None, "hqq", "fit='hqq' is how weights are rounded; say to what with quantize="),
    ):
        with pytest.raises((ConfigError, ParameterError), match=message):
            policies.load(folder, quantize=recipe, fit=fit)
