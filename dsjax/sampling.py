"""Drawing tokens from logits, on the device, with settings that are all dynamic.

The order is: logit bias and penalties, temperature, top-k, top-p, min-p. Temperature 0 takes the highest logit after
bias and penalties. Filters are thresholds on the logit, found by bisection and not by sorting the vocabulary, so tokens
that tie with the last one kept are kept too. Work that no slot asks for is skipped at run time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsjax.ragged.state import Sampling


def penalize(
    logits: Float[Array, "S V"], history: Int[Array, "S C"], penalty: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """Repetition penalty of CTRL (arXiv 1909.05858), as in transformers: over the prompt and what was generated.

    Args:
      logits: of the next token.
      history: tokens seen by each slot, out of range where there is none.
      penalty: divides positive logits of seen tokens and multiplies negative ones.

    Returns:
      The penalized logits.
    """

    def one(row, seen, factor):
        value = row.at[seen].get(mode="fill", fill_value=0)
        return row.at[seen].set(jnp.where(value > 0, value / factor, value * factor), mode="drop")

    return jax.vmap(one)(logits, history, penalty)


def _ordered(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers that sort as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _largest_threshold(keys: Int[Array, "S V"], weights: Float[Array, "S V"], wanted: Float[Array, "S"]):
    """The largest key such that the weights of keys at or above it sum to at least `wanted`: 32 halvings, exact."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # ceil of the mean, without overflow
        enough = jnp.sum(jnp.where(keys >= middle[:, None], weights, 0), axis=1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    info = jnp.iinfo(jnp.int32)
    bounds = (jnp.full(keys.shape[0], info.min, jnp.int32), jnp.full(keys.shape[0], info.max, jnp.int32))
    return lax.fori_loop(0, 32, halve, bounds)[0]


def keep(logits: Float[Array, "S V"], sampling: Sampling) -> Bool[Array, "S V"]:
    """Which tokens top-k, top-p and min-p leave, each over what the one before left.

    Args:
      logits: at the temperature that is sampled at.
      sampling: settings of each slot.

    Returns:
      True where a token may be drawn; at least one in each row.
    """
    vocab = logits.shape[-1]
    keys = _ordered(logits)
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kept = keys >= _largest_threshold(keys, jnp.ones_like(logits), top_k.astype(jnp.float32))[:, None]
    probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    # A mass of 1 may never be reached in float32; there, and at 0, the exact answers are known.
    nucleus = keys >= _largest_threshold(keys, probability, sampling.top_p)[:, None]
    kept &= nucleus | (sampling.top_p >= 1)[:, None]
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    kept &= logits >= likeliest + jnp.log(sampling.min_p)[:, None]
    return kept | (logits >= likeliest)


def sample(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    keys: jax.Array,
    history: Callable[[], Int[Array, "S C"]] | None = None,
    *,
    with_distribution: bool = False,
) -> tuple[Int[Array, "S"], Float[Array, "S"], Float[Array, "S"] | None]:
    """Draw one token a slot.

    Args:
      logits: the model's, float32.
      sampling: settings of each slot.
      keys: `key[S]`; the draw is a function of the slot's key and logits alone (the Gumbel trick).
      history: gives the tokens seen by each slot, for the repetition penalty; called only where some slot has one.
      with_distribution: also return the log-probability under the distribution that was sampled from.

    Returns:
      Tokens, their log-probabilities under the unmodified logits, and under the modified ones (or `None`).
    """
    own = logits
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias
    if history is not None:
        logits = lax.cond(
            jnp.any(sampling.repetition_penalty != 1),
            lambda x: penalize(x, history(), sampling.repetition_penalty),
            lambda x: x,
            logits,
        )
    greedy = jnp.argmax(logits, axis=-1)
    is_greedy = sampling.temperature <= 0

    def draw(logits):
        scaled = logits / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
        filtering = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        scaled = lax.cond(
            jnp.any(filtering & ~is_greedy),
            lambda x: jnp.where(keep(x, sampling), x, -jnp.inf),
            lambda x: x,
            scaled,
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        token = jnp.where(is_greedy, greedy, jnp.argmax(scaled + noise, axis=-1))
        return token, _log_probability(scaled, token) if with_distribution else jnp.zeros(token.shape)

    def pick(logits):
        return greedy, jnp.zeros(greedy.shape)

    token, used = lax.cond(jnp.all(is_greedy), pick, draw, logits)
    used = jnp.where(is_greedy, 0.0, used)  # greedy decoding draws from a distribution of one token
    return token.astype(jnp.int32), _log_probability(own, token), used if with_distribution else None


def _log_probability(logits: Float[Array, "S V"], token: Int[Array, "S"]) -> Float[Array, "S"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
