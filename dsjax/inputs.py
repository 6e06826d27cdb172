"""Checks and normal forms of what callers hand in, before anything is compiled.

Values that are traced can not be looked at; for these only shapes are checked. Known values stay on the host, in numpy,
so that laying out a request compiles nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsjax.config import ModelConfig
from dsjax.errors import RequestError

SMALLEST_PROMPT_BUCKET = 16


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, Tracer)


def as_batch(tokens: Any, lengths: Any, config: ModelConfig) -> tuple[Any, Any]:
    """Prompts as right-padded `int32[B, L]` and `int32[B]`.

    Lists are padded to a power of two, so that prompts of about one length share a program.

    Raises:
      RequestError: no prompts, an empty one, a token id out of range, or lengths that do not fit.
    """
    if isinstance(tokens, Sequence):
        if lengths is not None:
            raise RequestError("lengths goes with an array of tokens; lists have their own")
        if not tokens or not all(isinstance(row, Sequence | np.ndarray) for row in tokens):
            raise RequestError("tokens must be a list of lists of token ids, one for each prompt, or an array [B, L]")
        rows = [np.asarray(row, dtype=np.int64).reshape(-1) for row in tokens]
        longest = max(SMALLEST_PROMPT_BUCKET, *(row.size for row in rows))
        lengths = np.array([row.size for row in rows], np.int32)
        tokens = np.zeros((len(rows), 1 << (longest - 1).bit_length()), np.int64)
        for row, target in zip(rows, tokens, strict=True):
            target[: row.size] = row
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise RequestError(f"tokens must be integers [B, L], not {tokens.dtype}{list(tokens.shape)}")
    batch, capacity = tokens.shape
    if lengths is None:
        lengths = np.full(batch, capacity, np.int32)
    if np.shape(lengths) != (batch,):
        raise RequestError(f"lengths must be [{batch}], one for each prompt, not {list(np.shape(lengths))}")
    if not is_traced(lengths):
        lengths = np.asarray(lengths)
        for index, length in enumerate(lengths):
            if length < 1:
                raise RequestError(f"prompt {index} is empty; give at least one token (often the bos token)")
            if length > capacity:
                raise RequestError(f"prompt {index} has length {length}, but tokens holds only {capacity} a prompt")
        if not is_traced(tokens):
            ids = np.asarray(tokens)
            bad = ((ids < 0) | (ids >= config.vocab_size)) & (np.arange(capacity) < lengths[:, None])
            if bad.any():
                index, place = (int(i) for i in np.argwhere(bad)[0])
                raise RequestError(
                    f"prompt {index} has token id {ids[index, place]} at position {place}; "
                    f"ids of this model are 0 to {config.vocab_size - 1}"
                )
    return _as(tokens, jnp.int32), _as(lengths, jnp.int32)


def as_texts(tokens: Any, lengths: Any, config: ModelConfig) -> tuple[Any, Any]:
    """Whole texts for a dense pass, as `as_batch` gives them, no wider than the model's context.

    Raises:
      RequestError: as `as_batch`, or texts that are longer than the context.
    """
    padded_here = isinstance(tokens, Sequence)
    tokens, lengths = as_batch(tokens, lengths, config)
    longest = int(np.max(lengths)) if padded_here else tokens.shape[1]
    if longest > config.max_context:
        raise RequestError(f"{longest} tokens are longer than the model's context, {config.max_context}")
    return tokens[:, : config.max_context], lengths


def numpy_of(*values: Any) -> Any:
    """The array module to work with: `jax.numpy` as soon as one value is traced."""
    return jnp if any(is_traced(value) for value in values) else np


def _as(value: Any, dtype: Any) -> Any:
    return numpy_of(value).asarray(value, dtype)


def per_request(name: str, value: Any, batch: int, dtype: Any, low: float, high: float = np.inf) -> Any:
    """A setting that is shared or one for each request, as an array `[B]`.

    Raises:
      RequestError: names the setting, its value and its range.
    """
    if np.shape(value) not in ((), (batch,)):
        raise RequestError(f"{name} must be one value or one for each of {batch} prompts, not {list(np.shape(value))}")
    if not is_traced(value):
        known = np.asarray(value)
        wrong = known[~((known >= low) & (known <= high))]
        if wrong.size:
            limits = f"at least {low:g}" if high == np.inf else f"from {low:g} to {high:g}"
            raise RequestError(f"{name} must be {limits}, got {wrong.flat[0]}")
    return numpy_of(value).broadcast_to(_as(value, dtype), (batch,))


def request_keys(key: Any, batch: int, needed: bool) -> jax.Array:
    """A PRNG key for each request: `fold_in(key, index)`, or the given ones as they are.

    Raises:
      RequestError: sampling without a key, or keys of a wrong shape.
    """
    if key is None:
        if needed:
            raise RequestError("sampling (temperature above 0) needs key=jax.random.key(seed)")
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise RequestError(f"key must be one key or one for each of {batch} prompts, not {list(key.shape)}")
    return key


def stop_table(stop_ids: Any, ignore_eos: Any, batch: int, config: ModelConfig) -> Any:
    """Ids that end each request, `int32[B, E]`, -1 where there is none.

    Raises:
      RequestError: a stop id that is out of range, or a shape that does not fit.
    """
    xp = numpy_of(stop_ids, ignore_eos)
    ids = _as(stop_ids, jnp.int32)
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != batch):
        raise RequestError(f"stop_ids must be [E] or [{batch}, E], not {list(ids.shape)}")
    if not is_traced(ids) and ids.size and not -1 <= np.min(ids) <= np.max(ids) < config.vocab_size:
        raise RequestError(f"stop_ids has an id outside 0 to {config.vocab_size - 1}")
    # Room for a multiple of eight, so that one more stop id is not one more program.
    room = -(-max(ids.shape[-1], 1) // 8) * 8
    ids = xp.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, room - ids.shape[-1])], constant_values=-1)
    ids = xp.broadcast_to(ids, (batch, room))
    ignored = xp.broadcast_to(_as(ignore_eos, bool), (batch,))
    eos = np.asarray(config.eos_ids, np.int32).reshape(1, -1)
    return xp.concatenate([xp.where(ignored[:, None], np.int32(-1), eos), ids], axis=1)
