"""Quantized weights against the formats' definitions in numpy, and GGUF's against the gguf package."""

import functools

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_in_numpy import dequantized, nearest, rounded, spread
from hypothesis import strategies as st

from dsjax.errors import ConfigError, ParameterError
from dsjax.layers.linear import linear
from dsjax.quantization import SCHEMES, quantize_array, scheme

FITTED = ["q4_0", "q4_1", "int4", "int4_asym_g64", "nf4", "int8"]
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes the time of these tests


def error(found, weight):
    return np.sqrt(np.mean(np.square(np.asarray(found, np.float64) - weight)))


def draw(rng, shape):
    weight = (rng.standard_t(6, shape) * 0.02).astype(np.float32)
    weight[..., 1, :] = 0
    weight[..., 2, :] = np.abs(weight[..., 2, :])  # all of one sign
    weight[..., 3, :] *= -1e-5
    return weight


@pytest.fixture(scope="module")
def made():
    """A weight whose last blocks are cut off, by every scheme."""
    weight = draw(np.random.default_rng(0), (130, 256))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def every(weight):
        leaves = {name: quantize_array(weight, name) for name in SCHEMES}
        leaves |= {f"{name} hqq": quantize_array(weight, name, fit="hqq") for name in FITTED}
        return leaves, {name: leaf.dequantize() for name, leaf in leaves.items()}

    return weight, *every(weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_round_trip(made, name):
    weight, leaves, whole = made
    leaf, to = leaves[name], SCHEMES[name]
    parts = to.parts(weight.shape)
    assert {part: (array.shape, array.dtype) for part, array in leaf.parts()} == {
        part: (array.shape, array.dtype) for part, array in parts.items()
    }
    assert leaf.shape == weight.shape and leaf.nbytes == to.nbytes(weight.shape) and leaf.dtype == jnp.float32
    np.testing.assert_allclose(whole[name], dequantized(leaf), rtol=2e-6, atol=1e-9)
    assert error(whole[name], weight) <= 1.05 * error(rounded(weight, to), weight)
    assert not whole[name][1].any()


@pytest.mark.parametrize("name", [name for name in SCHEMES if name[0] != "q"])
def test_codes_are_the_nearest_for_the_scales_that_are_stored(made, name):
    weight, leaves, whole = made
    leaf, to = leaves[name], SCHEMES[name]
    scales = spread(leaf.scales, to, weight.shape)
    if leaf.tensor_scale is not None:
        scales = scales * np.asarray(leaf.tensor_scale, np.float64)
    zeros = to.zero if leaf.zeros is None else spread(np.asarray(leaf.zeros).astype(np.float64), to, weight.shape)
    numbers = np.where(scales == 0, 0, weight / np.where(scales == 0, 1, scales)) + zeros
    # A quotient that lies between two codes may be rounded to either.
    np.testing.assert_allclose(
        np.abs(dequantized(leaf) - weight), np.abs((nearest(numbers, to.element) - zeros) * scales - weight), atol=1e-8
    )


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_is_no_worse(made, name):
    weight, leaves, whole = made
    fitted, plain = error(whole[f"{name} hqq"], weight), error(whole[name], weight)
    assert fitted <= 1.002 * plain  # the scale is rounded once more
    if SCHEMES[name].bits == 4:
        assert fitted < 0.97 * plain
    np.testing.assert_allclose(whole[f"{name} hqq"], dequantized(leaves[f"{name} hqq"]), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_as_gguf(made, name):
    weight, leaves, _ = made
    leaf, kind = leaves[name], gguf.GGMLQuantizationType[name.upper()]
    blocks = gguf.quantize(weight, kind).reshape(130, 8, -1)
    floats = 4 if name == "q4_1" else 2
    np.testing.assert_array_equal(np.asarray(leaf.values).view(np.uint8), blocks[..., floats:].reshape(130, -1))
    np.testing.assert_array_equal(leaf.scales, np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0])
    if name == "q4_1":
        np.testing.assert_array_equal(leaf.minimums, np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0])


@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.generate])
@hypothesis.given(lead=st.sampled_from([(), (2,)]), out=st.integers(4, 140), runs=st.integers(1, 9), seed=st.integers())
def test_shapes(lead, out, runs, seed):
    weight = draw(np.random.default_rng(abs(seed)), (*lead, out, 32 * runs))
    names = ["fp6", "mxfp4", "fp8_e4m3_block", "fp8_e4m3_tensor", "int4_asym", "int4_g64"]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def every(weight):
        return {name: quantize_array(weight, name) for name in names if "g64" not in name or runs % 2 == 0}

    if runs % 2:
        with pytest.raises(
            ParameterError, match=rf"'int4_g64' has groups of 64, .* rows of {32 * runs}; these .* int4,"
        ):
            quantize_array(weight, "int4_g64")
    for name, leaf in every(weight).items():
        assert leaf.shape == weight.shape and leaf.nbytes == SCHEMES[name].nbytes(weight.shape)
        assert error(dequantized(leaf), weight) <= 1.05 * error(rounded(weight, SCHEMES[name]), weight), name


# Group sizes, widths, and bounds of DeepSpeed's tests/unit/inference/quantization and ops/quantizer, with fewer rows.
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_as_deepspeed_asks_of_integers(bits, group, rng):
    weight = rng.standard_normal((1024, 64)).astype(np.float32)
    found = dequantized(quantize_array(weight, scheme(f"int{bits}", symmetric=False, group_size=group)))
    found = np.abs(found - weight)
    assert found.mean() < 0.15 and found.max() < 0.5


# tests/unit/ops/fp_quantizer: 4 x 1024, groups of 128; qtorch rounds as ml_dtypes does.
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp6"])
def test_as_deepspeed_asks_of_floats(name, rng):
    weight, to = rng.standard_normal((4, 1024)).astype(np.float32), scheme(name, group_size=128, scale_dtype="float32")
    found, wanted = dequantized(quantize_array(weight, to)), rounded(weight, to)
    assert abs(np.abs(found - weight).mean() - np.abs(wanted - weight).mean()) < 4e-4


# test_quantized_linear_module: 37 tokens, its two sizes (the second one DeepSpeed refuses) and its bounds; and
# test_fp8_gemm: 8192 x 4096 in groups of 128, relative error.
@pytest.mark.parametrize("name, shape", [("fp6", (4096, 4096)), ("fp6", (1728, 4608)), ("fp8", (8192, 4096))])
def test_as_deepspeed_asks_of_products(name, shape, rng):
    to = scheme(name, group_size=128, scale_dtype="float32") if name == "fp8" else scheme(name)
    weight = (rng.standard_normal(shape, np.float32) * shape[1] ** -0.5).astype(np.float16)
    x = rng.standard_normal((37, shape[1]), np.float32).astype(np.float16)
    leaf = quantize_array(jnp.asarray(weight), to)
    found = np.asarray(jax.jit(linear)(jnp.asarray(x), {"weight": leaf}), np.float32)
    exact = x.astype(np.float32) @ np.asarray(dequantized(leaf), np.float32).T
    np.testing.assert_allclose(found, exact, rtol=3e-2, atol=2e-3)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.004


def test_leaves_are_quantized_anew(made):
    weight, leaves, whole = made
    again = quantize_array(leaves["int8"], "q4_0", dtype=jnp.bfloat16)
    assert again.scheme.name == "q4_0" and again.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.values, quantize_array(whole["int8"], "q4_0").values)


@pytest.mark.parametrize(
    ("weight", "options", "kind", "message"),
    [
        (np.zeros((4, 64)), {"to": "int3"}, ConfigError, "'int3' is unknown; known are: q4_0, "),
        (np.zeros((4, 64)), {"to": "int4", "fit": "gptq"}, ConfigError, "fit='gptq' is unknown"),
        (np.zeros((4, 64)), {"to": "mxfp4", "fit": "hqq"}, ConfigError, "'mxfp4' are too coarse"),
        (np.zeros((4, 64), int), {"to": "int4"}, ParameterError, "dtype int64"),
        (np.zeros(64), {"to": "int8", "name": "leaf 'a.scale'"}, ParameterError, r"leaf 'a.scale' has shape \[64\]"),
        (np.zeros((4, 80)), {"to": "int4_g128"}, ParameterError, "32 weights are packed .* rows of 80; leave it"),
        (np.zeros((4, 80)), {"to": "int8_g32"}, ParameterError, "groups of 32, .* rows of 80; these would: int8"),
    ],
)
def test_wrong_use(weight, options, kind, message):
    with pytest.raises(kind, match=message):
        quantize_array(weight, **options)
