"""A model ready to answer one prompt at a time: loaded, fused and compiled, with its tokenizer."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

import policies
from dsjax import streaming
from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from dsjax.params import Params, abstract, prepare, prepare_in_place
from dsjax.ragged.state import Queue
from dsjax.request import Capacity, request
from dsjax.streaming import StreamStep
from dsjax.tokenizer import load_tokenizer

DEFAULT_MAX_TOKENS = 256
# The least room that programs are compiled for, in tokens of prompt and of answer: up to here no prompt and no
# max_tokens costs a second compilation. Room costs nothing but the memory of its pages.
_PROMPT_ROOM, _ANSWER_ROOM = 1024, 512


class Session:
    """A model, its tokenizer, and the programs compiled so far. Weights are read when first needed.

    Args:
      model: a hub id, a folder or a file, as for `dsjax.load`.
      dtype: what to compute in.
      quantize: as for `dsjax.load`.
      max_model_len: longest sequence in tokens; `None` for the model's own limit.

    Raises:
      DsjaxError: the checkpoint can not be read, or `max_model_len` is beyond the model's limit.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, dtype: str, quantize: str | None, max_model_len: int | None = None
    ):
        self.config = limit_context(policies.load_config(model), max_model_len)
        self.tokenizer = load_tokenizer(model)
        self._model, self._dtype, self._quantize = model, dtype, quantize
        self._compiled: set[tuple] = set()

    @functools.cached_property
    def params(self) -> Params:
        """The prepared parameter tree.

        Raises:
          DsjaxError: as `dsjax.load`.
        """
        plain = self._quantize == "none"
        # Dequantizing as part of `prepare` reads and holds fewer bytes than doing it on loading.
        tree = policies.load(self._model, dtype=self._dtype, quantize=None if plain else self._quantize, progress=False)
        return prepare_in_place(Params(tree, self.config), dequantize=plain)

    @functools.cached_property
    def _shapes(self) -> Params:
        """All that compiling takes of the parameters; known before they are read unless some stay quantized."""
        if self._quantize == "none":
            return jax.eval_shape(prepare, abstract(self.config, self._dtype))
        return self.params

    def layout(self, ids: Sequence[int], max_tokens: int | None = None, **options: Any) -> tuple[Queue, Capacity]:
        """A request in sizes that many requests share, and so the programs compiled for them.

        Args:
          ids: the prompt.
          max_tokens: most new tokens; `None` for `DEFAULT_MAX_TOKENS`, or what the context leaves.
          **options: sampling settings of `dsjax.generate`.

        Raises:
          RequestError: what can not be served, with the remedy.
        """
        if max_tokens is None:
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, self.config.max_context - len(ids)))
        tokens = np.zeros((1, _room(len(ids), _PROMPT_ROOM)), np.int32)
        tokens[0, : len(ids)] = ids
        return request(
            self._shapes,
            tokens,
            np.array([len(ids)], np.int32),
            max_new_tokens=_room(max_tokens, _ANSWER_ROOM),
            limits=[max_tokens],
            # A CPU also computes a step's padding, and reads no faster in larger pieces.
            token_budget=64 if jax.default_backend() == "cpu" else 512,
            **options,
        )

    def stream(self, queue: Queue, capacity: Capacity) -> Iterator[StreamStep]:
        """Compile what such a request runs, or fetch it from the cache, while the weights are read; then run it.

        Both programs are ready before the first step: the second would otherwise keep the reader waiting between the
        first token and the next.
        """
        sizes = (capacity, queue.tokens.shape, queue.stop_ids.shape)
        programs = () if sizes in self._compiled else (streaming.mixed, streaming.decode)
        state = jax.eval_shape(lambda params, queue: streaming.begin(params, queue, capacity), self._shapes, queue)

        def build(program):
            program.lower(self._shapes, queue, state, capacity).compile()

        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(build, program) for program in programs]
            params = self.params
            for job in jobs:
                job.result()
        self._compiled.add(sizes)
        return streaming.follow(params, queue, capacity)


def _room(needed: int, least: int) -> int:
    """The power of two that holds so many, and at least `least`."""
    return max(least, 1 << (needed - 1).bit_length()) if needed else least


def limit_context(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    """The same architecture with a shorter context.

    Raises:
      ConfigError: the model was not made for so long a context.
    """
    if max_model_len is None:
        return config
    if max_model_len > config.max_context:
        raise ConfigError(f"max_model_len={max_model_len} is beyond the model's context of {config.max_context} tokens")
    return dataclasses.replace(config, max_context=max_model_len)
