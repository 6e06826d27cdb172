"""Drawing tokens from logits, on the device, with settings that are all dynamic.

The order is vLLM's, but min-p comes last, as in transformers:

1. tokens outside of `allowed` are ruled out;
2. stop ids are ruled out while fewer than `min_tokens` are generated;
3. logit bias, of some tokens and of all, is added;
4. the repetition penalty scales the logits of tokens that were seen;
5. the frequency and presence penalties are subtracted from the logits of tokens that were generated;
6. temperature, top-k, top-p and min-p, then the draw; temperature 0 takes the highest logit after 1 to 5.

Filters are thresholds on the logit, found by bisection and not by sorting the vocabulary, so tokens that tie with the
last one kept are kept too. Work that no slot asks for is skipped at run time, and is not in the program at all where
the setting is `None`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsjax.errors import RequestError
from dsjax.ragged.state import Sampling
from pallas_kernels.dispatch import current_gpu
from pallas_kernels.sampling_threshold import sampling_threshold


def keep_allowed(logits: Float[Array, "S V"], allowed: UInt32[Array, "S W"]) -> Float[Array, "S V"]:
    """Rule out every token that a bit mask leaves out.

    Args:
      logits: of the next token.
      allowed: `ceil(V / 32)` words a slot; bit `v % 32` of word `v // 32` is set where token `v` may be drawn.

    Returns:
      The logits, -inf where a token may not be drawn.
    """
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(len(allowed), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def rule_out(logits: Float[Array, "S V"], ids: Int[Array, "S E"], rows: Bool[Array, "S"]) -> Float[Array, "S V"]:
    """Rule out a few tokens, as transformers' `MinNewTokensLengthLogitsProcessor` does with the ends of a sequence.

    Args:
      logits: of the next token.
      ids: tokens, -1 where there is none.
      rows: the slots to do it in.

    Returns:
      The logits, -inf where a token may not be drawn.
    """
    slot, token = _places(jnp.where(rows[:, None], ids, -1), logits)
    return logits.at[slot, token].set(-jnp.inf, mode="drop")


def add_bias(logits: Float[Array, "S V"], ids: Int[Array, "S E"], values: Float[Array, "S E"]) -> Float[Array, "S V"]:
    """Add to the logits of a few tokens, as OpenAI's `logit_bias` does.

    Args:
      logits: of the next token.
      ids: tokens, -1 where there is none.
      values: what is added to each.

    Returns:
      The changed logits.
    """
    slot, token = _places(ids, logits)
    return logits.at[slot, token].add(values, mode="drop")


def _places(ids: Int[Array, "S E"], logits: Float[Array, "S V"]) -> tuple[Int[Array, "S 1"], Int[Array, "S E"]]:
    """Slots and tokens to scatter to, those below 0 put out of range: an index of -1 is the last token's."""
    return jnp.arange(len(ids))[:, None], jnp.where(ids < 0, logits.shape[1], ids)


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


def penalize_generated(
    logits: Float[Array, "S V"],
    new_tokens: Int[Array, "S C"],
    frequency: Float[Array, "S"],
    presence: Float[Array, "S"],
) -> Float[Array, "S V"]:
    """OpenAI's frequency and presence penalties, as in vLLM: over what was generated and not the prompt.

    Args:
      logits: of the next token.
      new_tokens: tokens that each slot generated, out of range where there is none.
      frequency: subtracted once for each time that a token was generated; below 0 it invites repetition.
      presence: subtracted once from every token that was generated.

    Returns:
      The penalized logits.
    """
    counts = jnp.zeros_like(logits).at[_places(new_tokens, logits)].add(1, mode="drop")
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


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


def _for_some(
    rows: Bool[Array, "S"], change: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_every_program: bool = False
) -> jax.Array:
    """`change(x)`, which leaves all but some rows as they are, skipped when there are none.

    On a GPU a skipped branch costs copies, and with drivers before 12.3 the CUDA graph of the step. So what stands in
    every program runs always there.
    """
    if in_every_program and current_gpu() is not None:
        return change(x)
    return lax.cond(jnp.any(rows), change, lambda x: x, x)


def sample(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    keys: jax.Array,
    history: Callable[[], Int[Array, "S C"]] | None = None,
    *,
    new_tokens: Callable[[], Int[Array, "S N"]] | None = None,
    generated: Int[Array, "S"] | None = None,
    stop_ids: Int[Array, "S E"] | None = None,
    with_distribution: bool = False,
    own: Float[Array, "S V"] | None = None,
) -> tuple[Int[Array, "S"], Float[Array, "S"], Float[Array, "S"] | None]:
    """Draw one token a slot.

    Args:
      logits: the model's, float32, or what somebody made of them.
      sampling: settings of each slot. They must leave some token of each row.
      keys: `key[S]`; the draw is a function of the slot's key and logits alone (the Gumbel trick).
      history: gives the tokens seen by each slot, for the repetition penalty; called only where some slot has one.
      new_tokens: gives the tokens generated by each slot, out of range where there is none, for the frequency and
        presence penalties; called only where some slot has one.
      generated: how many tokens each slot has generated, for `min_tokens`.
      stop_ids: tokens that end each slot's sequence, -1 where there is none, for `min_tokens`.
      with_distribution: also return the log-probability under the distribution that was sampled from.
      own: the model's logits, if `logits` are not.

    Returns:
      Tokens, their log-probabilities under the model's logits, and under the modified ones (or `None`).

    Raises:
      RequestError: a setting is there without the argument that it is for.
    """
    own = logits if own is None else own
    logits = _constrain(logits, sampling, generated, stop_ids)
    logits = _penalize(logits, sampling, history, new_tokens)
    is_greedy = sampling.temperature <= 0

    def draw(logits):
        scaled = logits / jnp.where(is_greedy, 1, sampling.temperature)[:, None]
        filtering = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        scaled = _for_some(
            filtering & ~is_greedy, lambda x: jnp.where(keep(x, sampling), x, -jnp.inf), scaled, in_every_program=True
        )
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


def _constrain(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    generated: Int[Array, "S"] | None,
    stop_ids: Int[Array, "S E"] | None,
) -> Float[Array, "S V"]:
    """What may be drawn at all, and bias."""
    allowed, ids, values = sampling.allowed, sampling.bias_ids, sampling.bias_values
    if allowed is not None:
        logits = _for_some(jnp.any(~allowed, axis=-1), lambda x: keep_allowed(x, allowed), logits)
    if sampling.min_tokens is not None:
        if generated is None or stop_ids is None:
            raise RequestError("Sampling.min_tokens needs the arguments generated and stop_ids of sample")
        early = generated < sampling.min_tokens
        logits = _for_some(early, lambda x: rule_out(x, stop_ids, early), logits)
    if ids is not None:
        if values is None:
            raise RequestError("Sampling.bias_ids needs Sampling.bias_values")
        logits = _for_some(jnp.any(ids >= 0, axis=-1), lambda x: add_bias(x, ids, values), logits)
    return logits if sampling.logit_bias is None else logits + sampling.logit_bias


def _penalize(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    history: Callable[[], Int[Array, "S C"]] | None,
    new_tokens: Callable[[], Int[Array, "S N"]] | None,
) -> Float[Array, "S V"]:
    """The penalties of what stands in the text already."""
    repetition, frequency, presence = (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    if repetition is not None and history is not None:
        logits = _for_some(repetition != 1, lambda x: penalize(x, history(), repetition), logits, in_every_program=True)
    if frequency is None and presence is None:
        return logits
    if new_tokens is None:
        raise RequestError("Sampling.frequency_penalty and presence_penalty need the argument new_tokens of sample")
    frequency, presence = (jnp.zeros(len(logits), logits.dtype) if x is None else x for x in (frequency, presence))
    return _for_some(
        (frequency != 0) | (presence != 0),
        lambda x: penalize_generated(x, new_tokens(), frequency, presence),
        logits,
    )


def top_logprobs(
    logits: Float[Array, "S V"], token: Int[Array, "S"], count: int
) -> tuple[Int[Array, "S K"], Float[Array, "S K"], Int[Array, "S"]]:
    """The likeliest tokens under the unmodified logits, and how likely the one that was drawn is among all.

    Args:
      logits: the model's, float32.
      token: the drawn ones.
      count: how many to give (`K`), at most `V`; part of the program.

    Returns:
      Their ids, likeliest first and lower ids first among equals; their log-probabilities; and the rank of `token`, 1
      for the likeliest, which equals share.

    Raises:
      RequestError: there are fewer than `count` tokens.
    """
    if not 0 <= count <= logits.shape[1]:
        raise RequestError(f"top_logprobs can give 0 to {logits.shape[1]} tokens, the vocabulary, not {count}")
    values, ids = lax.top_k(logits, count)
    rank = 1 + jnp.sum(logits > jnp.take_along_axis(logits, token[:, None], axis=1), axis=-1, dtype=jnp.int32)
    return ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True), rank


def _log_probability(logits: Float[Array, "S V"], token: Int[Array, "S"]) -> Float[Array, "S"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
