"""Thresholds by bisection, one program a row: what a row does not ask for is not computed.

A row of a large vocabulary is half a megabyte: it comes from the L2 cache in each pass, at the rate of one
multiprocessor, and all rows go at once. As one kernel it needs no host to look at the settings, so the step around it
stays one CUDA graph.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltriton, triton_call
from pallas_kernels.dispatch import triton_refusals
from pallas_kernels.sampling_threshold.bisection import LOWEST, ROUNDS, from_key, to_key

BLOCK = 4096
WARPS = 16


def refusals(*, gpu):
    """Why the kernel can not run."""
    return triton_refusals(gpu)


def threshold(logits, top_k, top_p, min_p):
    """See `api.sampling_threshold`."""
    rows, vocab = logits.shape
    return triton_call(
        functools.partial(_kernel, vocab=vocab),
        logits,
        top_k,
        top_p,
        min_p,
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.float32),
        grid=(rows,),
        name="sampling_threshold",
        num_warps=WARPS,
        num_stages=2,
    )


def _kernel(logits_ref, top_k_ref, top_p_ref, min_p_ref, out_ref, *, vocab):
    row = pl.program_id(0)
    top_k, top_p, min_p = top_k_ref[row], top_p_ref[row], min_p_ref[row]
    lanes = jnp.arange(BLOCK)
    chunks = (vocab + BLOCK - 1) // BLOCK

    def reduce(active, combine, initial, passes):
        """Fold the row, chunk by chunk, into accumulators of a chunk's width; no chunk where it is not active."""

        def body(chunk, carry):
            column = chunk * BLOCK + lanes
            x = pltriton.load(logits_ref.at[row, column], mask=column < vocab, other=-jnp.inf)
            return combine(x, carry)

        carry = tuple(jnp.full((BLOCK,), initial, jnp.float32) for _ in range(passes))
        return lax.fori_loop(0, jnp.int32(chunks) * active, body, carry)

    def search(active, weigh, wanted):
        def refine(round, found):
            shift = 2 * (ROUNDS - 1 - round)
            candidates = [found + (candidate << shift) for candidate in (1, 2, 3)]

            def combine(x, totals):
                keys, weight = to_key(x), weigh(x)
                return tuple(
                    total + jnp.where(keys >= candidate, weight, 0.0)
                    for total, candidate in zip(totals, candidates, strict=True)
                )

            totals = reduce(1, combine, 0.0, 3)
            enough = [(jnp.sum(total) >= wanted).astype(jnp.int32) for total in totals]
            return found + (sum(enough) << shift)

        return lax.fori_loop(0, jnp.int32(ROUNDS) * active, refine, jnp.int32(LOWEST))

    by_rank, by_mass = (top_k > 0).astype(jnp.int32), (top_p < 1).astype(jnp.int32)
    filters = by_rank | by_mass | (min_p > 0).astype(jnp.int32)
    highest = jnp.max(reduce(filters, lambda x, carry: (jnp.maximum(carry[0], x),), -jnp.inf, 1)[0])
    by_k = search(by_rank, jnp.ones_like, top_k.astype(jnp.float32))

    def weigh(x):
        return jnp.where(to_key(x) >= by_k, jnp.exp(x - highest), 0.0)

    (total,) = reduce(by_mass, lambda x, carry: (carry[0] + weigh(x),), 0.0, 1)
    by_p = search(by_mass, weigh, top_p * jnp.sum(total))
    lowest = from_key(jnp.minimum(jnp.maximum(by_k, by_p), to_key(highest)))
    lowest = jnp.minimum(jnp.maximum(lowest, highest + jnp.log(min_p)), highest)
    out_ref[row] = jnp.where(filters > 0, lowest, -jnp.inf)
