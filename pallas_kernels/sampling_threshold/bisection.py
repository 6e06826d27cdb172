"""Floats as integers of the same order, which a threshold is found in bit by bit.

The largest key such that what lies at or above it still weighs enough is the key of one of the logits. Two bits a pass
make 16 passes: three candidates are weighed in each, and digits that are enough are counted, weights being monotone.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

LOWEST = np.iinfo(np.int32).min
HIGHEST = np.iinfo(np.int32).max
ROUNDS = 16


def to_key(x):
    """Integers that sort as float32 does."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ HIGHEST, bits)


def from_key(key):
    """The float32 of a key; -inf for the lowest, which stands for no threshold at all."""
    bits = jnp.where(key < 0, key ^ HIGHEST, key)
    return jnp.where(key == LOWEST, -jnp.inf, lax.bitcast_convert_type(bits, jnp.float32))
