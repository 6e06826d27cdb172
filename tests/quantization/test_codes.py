"""The small floats against ml_dtypes, code by code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_in_numpy import TABLES, nearest

from dsjax.quantization.codes import ELEMENTS, LIMITS, encode
from pallas_kernels.quantized_matmul import formats

PACKED = [name for name, element in ELEMENTS.items() if element.bits < 8]


@pytest.mark.parametrize("element", PACKED)
def test_every_code_is_read_as_its_number(element):
    codes = jnp.arange(1 << ELEMENTS[element].bits, dtype=jnp.uint8)
    np.testing.assert_array_equal(
        jax.jit(formats.numbers, static_argnums=1)(codes, element), TABLES[element].astype(np.float32)
    )
    assert (TABLES[element].min(), TABLES[element].max()) == LIMITS[element]


@pytest.mark.parametrize("element", ELEMENTS)
def test_numbers_are_rounded_to_the_nearest(element, rng):
    kind = ELEMENTS[element]
    numbers = rng.uniform(1.2 * LIMITS[element][0], 1.2 * LIMITS[element][1], 2000)
    numbers[::2] *= 2.0 ** -rng.integers(0, 12, 1000)  # near zero, where small floats are subnormal
    numbers = numbers.astype(np.float32)
    codes = jax.jit(encode, static_argnums=1)(numbers, element)
    found = np.asarray(formats.numbers(codes, element) if kind.bits < 8 else codes).astype(np.float64)
    np.testing.assert_array_equal(found, nearest(numbers.astype(np.float64), element))


@pytest.mark.parametrize("element", ["e2m1", "e3m2", "e4m3", "int8"])
def test_ties_go_to_even_codes(element):
    table = np.unique(TABLES[element][np.isfinite(TABLES[element])])
    halves = (table[1:] + table[:-1]) / 2
    codes = encode(jnp.asarray(halves, jnp.float32), element)
    codes = np.asarray(codes.view(jnp.uint8)) & (1 << ELEMENTS[element].bits) - 1
    assert np.all(codes[halves != 0] % 2 == 0)
