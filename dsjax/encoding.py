"""Dense, differentiable encoding: hidden states of texts and images, and one vector for each."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError, RequestError
from dsjax.inputs import as_batch, as_texts, is_traced
from dsjax.layers.linear import linear
from dsjax.layers.patches import embed_patches
from dsjax.params import Params, validate
from dsjax.transformer import encode_rows, hidden_states

POOLINGS = ("mean", "cls", "last", "pooler", "none")


def encode(
    params: Params,
    tokens: Any,
    lengths: Any = None,
    *,
    token_types: Any = None,
    pooling: str = "mean",
    normalize: bool = False,
) -> Float[Array, "B *places D"]:
    """One vector for each text, or its hidden states; differentiable. Padding changes nothing.

    Args:
      params: parameter tree of an encoder or of any model that reads tokens.
      tokens: lists of token ids (padded to a power of two `L`), or right-padded `int32[B, L]`.
      lengths: `int32[B]`, default all `L`.
      token_types: segment of each token in the form of `tokens`, default the first, in models that tell them apart.
      pooling: `"mean"` of the hidden states; that of the first token, `"cls"`, or of the last, `"last"`; `"pooler"` for
        the model's own (BERT: a dense layer with tanh over the first token; CLIP: the state of the token that ends the
        text, projected to the space that images share); `"none"` for all hidden states.
      normalize: scale every vector to length 1.

    Returns:
      `float32[B, D]`, or `float32[B, L, D]` with `"none"`, which is 0 past a text's length.

    Raises:
      RequestError: tokens that do not fit the model, or a pooling that it does not have.
      ConfigError: the model reads images.
    """
    validate(params)
    config = params.config
    if config.patches is not None:
        raise ConfigError(f"a {config.model_type} reads images, not tokens; see dsjax.encode_image")
    _check_pooling(pooling, config)
    types = None if token_types is None else _token_types(token_types, tokens, lengths, config)
    tokens, lengths = as_texts(tokens, lengths, config)
    if types is not None:
        types = types[:, : tokens.shape[1]]
        if types.shape != tokens.shape:
            raise RequestError(f"token_types {list(types.shape)} must have the shape of tokens {list(tokens.shape)}")
    elif config.token_types:
        types = np.zeros(tokens.shape, np.int32)  # so that giving them is not another program
    if pooling == "pooler" and config.pooler == "end":
        _check_ends(tokens, lengths, config)
    states = _states(params, tokens, lengths, types)
    return _pool(params, states, tokens, lengths, pooling=pooling, normalize=normalize)


def encode_image(params: Params, pixels: Any, *, normalize: bool = False) -> Float[Array, "B D"]:
    """One vector for each image; differentiable.

    Args:
      params: parameter tree of a vision encoder (CLIP).
      pixels: float `[B, C, H, W]`, resized and normalized as in training: what transformers' image processors give as
        `pixel_values`.
      normalize: scale every vector to length 1.

    Returns:
      `float32[B, D]`: the state of the token that stands for the whole image, normed, and projected to the space that
      texts share where the model has a projection.

    Raises:
      RequestError: pixels that do not fit the model.
      ConfigError: the model reads tokens.
    """
    validate(params)
    config = params.config
    if config.patches is None:
        raise ConfigError(f"a {config.model_type} reads tokens, not images; see dsjax.encode")
    pixels = jnp.asarray(pixels)
    expected = (config.patches.channels, config.patches.image_size, config.patches.image_size)
    if pixels.ndim != 4 or pixels.shape[1:] != expected or not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise RequestError(
            f"pixels must be floating [B, {', '.join(map(str, expected))}] (channels first), not "
            f"{pixels.dtype}{list(pixels.shape)}"
        )
    return _encode_image(params, pixels, normalize=normalize)


def _check_pooling(pooling: str, config: ModelConfig) -> None:
    if pooling not in POOLINGS:
        raise RequestError(f"pooling={pooling!r} is unknown; there are {', '.join(POOLINGS)}")
    if pooling == "pooler" and config.pooler is None:
        raise RequestError(f"this {config.model_type} has no pooler; pool by 'mean', 'cls' or 'last'")
    if pooling == "cls" and config.causal:
        raise RequestError(
            f"pooling='cls' takes the first token, which in a causal model ({config.model_type}) sees only itself; "
            "pool by 'last' or 'mean'"
        )


def _check_ends(tokens: Any, lengths: Any, config: ModelConfig) -> None:
    if not config.eos_ids or is_traced(tokens) or is_traced(lengths):
        return
    ends = np.isin(tokens, config.eos_ids) & (np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None])
    if not ends.any(axis=1).all():
        raise RequestError(
            f"prompt {int(np.argmin(ends.any(axis=1)))} has no token {config.eos_ids[0]}, which ends a text and which "
            "this model's pooler looks for; append it"
        )


def _token_types(token_types: Any, tokens: Any, lengths: Any, config: ModelConfig) -> Any:
    """Segments in the form of `tokens`, as an array."""
    if not config.token_types:
        raise RequestError(f"this {config.model_type} does not tell segments apart; leave token_types out")
    if isinstance(token_types, Sequence) != isinstance(tokens, Sequence):
        raise RequestError("token_types must come in the form of tokens: both lists of lists, or both arrays [B, L]")
    try:
        types, sizes = as_batch(token_types, lengths, dataclasses.replace(config, vocab_size=config.token_types))
    except RequestError as error:
        raise RequestError(f"token_types: {error}") from error
    if isinstance(tokens, Sequence) and sizes.tolist() != [np.size(row) for row in tokens]:
        raise RequestError("token_types must have one segment for each token of each text")
    return types


_states = jax.jit(hidden_states)


# Apart from the layers, which are compiled once for all poolings.
@functools.partial(jax.jit, static_argnames=("pooling", "normalize"))
def _pool(
    params: Params,
    states: Float[Array, "B L D"],
    tokens: Int[Array, "B L"],
    lengths: Int32[Array, "B"],
    pooling: str,
    normalize: bool,
) -> Float[Array, "B *places D"]:
    is_real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    if pooling in ("mean", "none"):
        out = jnp.where(is_real[..., None], states.astype(jnp.float32), 0)
        if pooling == "mean":
            out = out.sum(axis=1) / lengths[:, None]
    else:
        place = jnp.zeros_like(lengths)
        if pooling == "last":
            place = lengths - 1
        elif pooling == "pooler" and params.config.pooler == "end":
            place = _end_of_text(tokens, is_real, params.config)
        out = jnp.take_along_axis(states, place[:, None, None], axis=1)[:, 0]
        if pooling == "pooler":
            out = _pooled(out, params)
    return _finished(out, normalize)


def _end_of_text(tokens, is_real, config: ModelConfig) -> Int[Array, "B"]:
    """Where the first token that ends a text stands; in models that do not name one, that of the highest id."""
    if not config.eos_ids:
        return jnp.argmax(jnp.where(is_real, tokens, -1), axis=1)
    return jnp.argmax(is_real & jnp.isin(tokens, jnp.asarray(config.eos_ids)), axis=1)


def _pooled(state: Float[Array, "B D"], params: Params) -> Float[Array, "B P"]:
    if params.config.pooler == "tanh":
        state = jnp.tanh(linear(state, params["pooler"]))
    return state if params.config.projection_size is None else linear(state, params["projection"])


def _finished(out: Array, normalize: bool) -> Array:
    out = out.astype(jnp.float32)
    if not normalize:
        return out
    # Rows of padding are 0 and stay so.
    return out * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(out), axis=-1, keepdims=True), 1e-24))


@functools.partial(jax.jit, static_argnames="normalize")
def _encode_image(params: Params, pixels: Float[Array, "B C H W"], normalize: bool) -> Float[Array, "B P"]:
    states = encode_rows(params, embed_patches(pixels, params, params.config))
    return _finished(_pooled(states[:, 0], params), normalize)
