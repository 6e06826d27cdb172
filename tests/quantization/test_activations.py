"""Products of quantized activations and weights, against the same in numpy and float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from formats_in_numpy import dequantized, nearest

from dsjax.errors import ConfigError
from dsjax.quantization import SCHEMES, quantize_array, scheme
from dsjax.quantization.activations import quantize_rows, quantized_product, takes_quantized_rows

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rows(rng, shape=(7, 96)):
    x = rng.standard_normal(shape) * np.exp(rng.normal(size=(shape[0], 1)))
    x[2] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize(("element", "largest"), [("int8", 127), ("e4m3", 448), ("e5m2", 57344)])
def test_each_row_has_its_scale(element, largest, rng):
    x = rows(rng)
    codes, scales = quick(quantize_rows, static_argnums=1)(x, element)
    wanted = np.abs(x).max(axis=1, keepdims=True) / largest
    np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    numbers = np.divide(x, scales, where=wanted > 0, out=np.zeros_like(x))
    np.testing.assert_array_equal(np.asarray(codes, np.float64), nearest(numbers.astype(np.float64), element))


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e4m3_tensor", "fp8_e5m2"])
def test_product(name, rng):
    x, weight = rows(rng), quantize_array(rng.standard_normal((40, 96)).astype(np.float32), name)
    product = quick(quantized_product)
    out = product(x.reshape(7, 1, 96), weight)
    assert out.shape == (7, 1, 40) and product(x.astype(ml_dtypes.bfloat16), weight).dtype == jnp.bfloat16
    codes, scales = quantize_rows(jnp.asarray(x), "int8" if name == "int8" else "e4m3")
    rounded = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)
    np.testing.assert_allclose(out[:, 0], rounded @ dequantized(weight).T, rtol=1e-4, atol=1e-4)
    error = np.linalg.norm(out[:, 0] - x @ dequantized(weight).T) / np.linalg.norm(out)
    assert error < (0.012 if name == "int8" else 0.03)


def test_wrong_use(rng):
    weight = quantize_array(rng.standard_normal((4, 64)).astype(np.float32), "int8_g32")
    with pytest.raises(ConfigError, match="'int8' or 'fp8_e4m3'; this one is 'int8_g32'"):
        quantized_product(jnp.ones((1, 64)), weight)
    takes = {name for name, scheme in SCHEMES.items() if takes_quantized_rows(scheme)}
    asked = {name for name, scheme in SCHEMES.items() if scheme.activations is not None}
    assert asked == {"int8_w8a8", "fp8_e4m3_w8a8"}
    assert takes == {"int8", "fp8_e4m3", "fp8_e4m3_tensor", "fp8_e5m2", "fp8_e5m2_tensor"} | asked
    with pytest.raises(ConfigError, match="activations='int8': inputs are rounded to 'int8' beside int8 codes"):
        scheme("int4", activations="int8")
