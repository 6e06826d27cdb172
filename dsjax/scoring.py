"""Dense, differentiable passes: logits and log-probabilities of given tokens."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.inputs import as_texts
from dsjax.params import Params, validate
from dsjax.transformer import dense_logits, dense_score


def _checked(params: Params, tokens: Any, lengths: Any):
    validate(params)
    params.config.require_head()
    return as_texts(tokens, lengths, params.config)


def logits(params: Params, tokens: Any, lengths: Any = None) -> Float[Array, "B L V"]:
    """Logits at every position of given texts, with no cache; differentiable.

    Args:
      params: parameter tree.
      tokens: lists of token ids (padded to a power of two `L`), or right-padded `int32[B, L]`.
      lengths: `int32[B]`, default all `L`.

    Returns:
      `float32[B, L, V]`; rows past a text's length hold nothing of use.

    Raises:
      RequestError: tokens that do not fit the model.
      ConfigError: the model has no head that predicts tokens.
    """
    return dense_logits(params, *_checked(params, tokens, lengths))


def score(params: Params, tokens: Any, lengths: Any = None) -> Float[Array, "B L"]:
    """Log-probability of each token given those before it; differentiable.

    Args:
      params: parameter tree.
      tokens: lists of token ids (padded to a power of two `L`), or right-padded `int32[B, L]`.
      lengths: `int32[B]`, default all `L`.

    Returns:
      `float32[B, L]`; 0 for the first token of a text and past its length.

    Raises:
      RequestError: tokens that do not fit the model.
      ConfigError: the model has no head that predicts tokens.
    """
    tokens, lengths = _checked(params, tokens, lengths)
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], dense_score(params, tokens, lengths), 0)
