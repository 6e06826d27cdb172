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
from pallas_kernels.dispatch import current_gpu
from pallas_kernels.sampling_threshold import sampling_threshold


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


def keep(logits: Float[Array, "S V"], sampling: Sampling) -> Bool[Array, "S V"]:
    """Which tokens top-k, top-p and min-p leave, each over what the one before left.

    Args:
      logits: at the temperature that is sampled at.
      sampling: settings of each slot.

    Returns:
      True where a token may be drawn; at least one in each row.
    """
    lowest = sampling_threshold(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    return logits >= lowest[:, None]


def _for_some(rows: Bool[Array, "S"], change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change(x)`, which leaves all but some rows as they are.

    A CPU skips it when there are none. On a GPU the host would have to wait to learn that, and the step would no longer
    be one CUDA graph.
    """
    return lax.cond(jnp.any(rows), change, lambda x: x, x) if current_gpu() is None else change(x)


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
        penalty = sampling.repetition_penalty
        logits = _for_some(penalty != 1, lambda x: penalize(x, history(), penalty), logits)
    is_greedy = sampling.temperature <= 0

    def draw(logits):
        scaled = logits / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
        filtering = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        scaled = _for_some(filtering & ~is_greedy, lambda x: jnp.where(keep(x, sampling), x, -jnp.inf), scaled)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        token = jnp.argmax(jnp.where(is_greedy[:, None], logits, scaled + noise), axis=-1)
        return token, _log_probability(scaled, token) if with_distribution else jnp.zeros(token.shape)

    def pick(logits):
        return jnp.argmax(logits, axis=-1), jnp.zeros(logits.shape[:1])

    if current_gpu() is None:
        token, used = lax.cond(jnp.all(is_greedy), pick, draw, logits)
    else:
        token, used = draw(logits)
    used = jnp.where(is_greedy, 0.0, used)  # greedy decoding draws from a distribution of one token
    return token.astype(jnp.int32), _log_probability(own, token), used if with_distribution else None


def _log_probability(logits: Float[Array, "S V"], token: Int[Array, "S"]) -> Float[Array, "S"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
