"""The quantized leaf against the formats' definitions, written out in numpy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dsjax.quantization import SCHEMES, QuantizedArray


def make(scheme, rng, rows, groups):
    group = SCHEMES[scheme].group_size
    bits = SCHEMES[scheme].bits
    integers = (
        rng.integers(0, 16, (rows, groups, group)) if bits == 4 else rng.integers(-128, 128, (rows, groups, group))
    )
    values = integers.astype(np.int8)
    if bits == 4:
        values = (integers[..., : group // 2] | integers[..., group // 2 :] << 4).astype(np.uint8)
    scales, minimums = (rng.normal(size=(rows, groups)).astype(np.float16) for _ in range(2))
    leaf = QuantizedArray(
        values=jnp.asarray(values.reshape(rows, -1)),
        scales=jnp.asarray(scales),
        minimums=jnp.asarray(minimums) if SCHEMES[scheme].has_minimum else None,
        scheme=SCHEMES[scheme],
        dtype=jnp.dtype("float32"),
    )
    weight = (integers - SCHEMES[scheme].zero) * scales[..., None].astype(np.float64)
    if SCHEMES[scheme].has_minimum:
        weight = weight + minimums[..., None]
    return leaf, weight.reshape(rows, -1)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@hypothesis.settings(max_examples=25)
@hypothesis.given(rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_dequantize(scheme, rows, groups, seed):
    leaf, weight = make(scheme, np.random.default_rng(seed), rows, groups)
    assert leaf.shape == weight.shape and leaf.ndim == 2 and leaf.size == weight.size
    np.testing.assert_allclose(leaf.dequantize(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_it_is_a_pytree(scheme, rng):
    leaf, weight = make(scheme, rng, 4, 3)
    same = jax.jit(lambda x: x)(leaf)
    assert same.scheme is leaf.scheme and same.shape == leaf.shape
    np.testing.assert_array_equal(leaf[jnp.array([2, 0])].dequantize(), leaf.dequantize()[jnp.array([2, 0])])
    joined = QuantizedArray.concatenate([leaf, leaf[:1]])
    np.testing.assert_array_equal(joined.dequantize()[4], leaf.dequantize()[0])
    assert leaf.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16
    stored = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[scheme]  # bytes of a block in the file
    assert leaf.nbytes == 4 * 3 * stored
    assert scheme in repr(leaf)
