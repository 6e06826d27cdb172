"""Thresholds by bisection over whole rows in plain XLA operations: no sort, and exact."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sampling_threshold.bisection import LOWEST, ROUNDS, from_key, to_key


def threshold(logits, top_k, top_p, min_p):
    """See `api.sampling_threshold`."""
    keys = to_key(logits)
    highest = jnp.max(logits, axis=-1)
    by_k = _search(keys, jnp.ones_like(logits), top_k.astype(jnp.float32), top_k > 0)
    weights = jnp.where(keys >= by_k[:, None], jnp.exp(logits - highest[:, None]), 0)
    by_p = _search(keys, weights, top_p * jnp.sum(weights, axis=-1), top_p < 1)
    lowest = from_key(jnp.minimum(jnp.maximum(by_k, by_p), to_key(highest)))
    return jnp.minimum(jnp.maximum(lowest, highest + jnp.log(min_p)), highest)


def _search(keys, weights, wanted, active):
    def refine(round, found):
        shift = 2 * (ROUNDS - 1 - round)
        digit = jnp.zeros_like(found)
        for candidate in (1, 2, 3):
            above = keys >= (found + (candidate << shift))[:, None]
            digit += jnp.sum(jnp.where(above, weights, 0), axis=-1) >= wanted
        return found + (digit << shift)

    found = lax.fori_loop(0, ROUNDS, refine, jnp.full(keys.shape[0], LOWEST, jnp.int32))
    return jnp.where(active, found, LOWEST)
