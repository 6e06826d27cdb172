"""Leaves as arrays of qwix and back; with qwix where it is installed, else with its array's few lines."""

import dataclasses
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from formats_in_numpy import NF4, dequantized

from dsjax.errors import ConfigError, ParameterError
from dsjax.quantization import quantize_array
from dsjax.quantization.qwix import from_qwix, to_qwix


@dataclasses.dataclass
class QArray:
    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = None


@pytest.fixture(autouse=True)
def qwix(monkeypatch):
    try:
        import qwix
    except ImportError:
        qwix = types.SimpleNamespace(QArray=QArray)
        monkeypatch.setitem(sys.modules, "qwix", qwix)
    return qwix


def whole(array):
    """What a qwix array stands for, by its docstring."""
    numbers = np.asarray(array.qvalue).astype(np.float64)
    numbers = NF4[numbers.astype(int)] if array.qtype == "nf4" else numbers

    def spread(scale):
        scale = np.asarray(scale).astype(np.float64)
        for axis, (size, count) in enumerate(zip(numbers.shape, scale.shape, strict=True)):
            scale = scale.repeat(size // count, axis)
        return scale

    return (numbers - (0 if array.zero_point is None else spread(array.zero_point))) * spread(array.scale)


NAMES = ["int8", "int8_asym_g32", "int4", "int4_asym_g64", "fp8_e4m3_block", "fp8_e4m3_tensor", "nf4"]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, rng, qwix):
    leaf = quantize_array(rng.standard_normal((2, 256, 256)).astype(np.float32), name)
    array = to_qwix(leaf)
    np.testing.assert_allclose(whole(array), dequantized(leaf), rtol=1e-12)
    if hasattr(qwix, "dequantize"):
        np.testing.assert_allclose(np.asarray(qwix.dequantize(array), np.float64), dequantized(leaf), rtol=1e-2)
    back = from_qwix(array, jnp.float32)
    assert back.scheme == leaf.scheme and back.layout == "rows" and back.dtype == jnp.float32
    for part, wanted in leaf.parts():
        np.testing.assert_array_equal(getattr(back, part), wanted)


def test_wrong_use(rng):
    weight = rng.standard_normal((130, 96)).astype(np.float32)
    for name in ("fp6", "mxfp4", "nvfp4", "q4_1", "fp8_block"):
        with pytest.raises(ConfigError, match=r"can not hold QuantizedArray\(.*int8, int4, fp8 and nf4"):
            to_qwix(quantize_array(weight, name))
    with pytest.raises(ConfigError, match="zero points are float16"):
        to_qwix(quantize_array(weight, "int4_asym", fit="hqq"))
    with pytest.raises(ConfigError, match="int2 values with float32 scales"):
        from_qwix(QArray(jnp.zeros((4, 64), jnp.int2), jnp.ones((4, 1))))
    with pytest.raises(ParameterError, match="the qwix array: 32 weights are packed together .* rows of 40"):
        from_qwix(QArray(jnp.zeros((4, 40), jnp.int4), jnp.ones((4, 1))))
