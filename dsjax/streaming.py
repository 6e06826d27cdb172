"""Tokens as they come, for one prompt: a host loop around the same steps that `generate` runs on the device."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dsjax.errors import RequestError
from dsjax.generation import decode_steps, mixed_step, start
from dsjax.params import Params
from dsjax.ragged.schedule import admit
from dsjax.ragged.state import Finish, Queue, State
from dsjax.request import Capacity, request


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """What one call of the device gave."""

    tokens: list[int]  # new token ids, none while the prompt is read
    logprobs: list[float]  # of each, under the model's own distribution
    prompt_tokens_read: int
    finish: Finish


@functools.partial(jax.jit, static_argnames="capacity")
def begin(params: Params, queue: Queue, capacity: Capacity) -> State:
    """The first state, with the prompt admitted."""
    return admit(queue, start(params, queue, capacity))


@functools.partial(jax.jit, static_argnames="capacity", donate_argnames="state")
def mixed(params: Params, queue: Queue, state: State, capacity: Capacity) -> State:
    """Read the next piece of the prompt; consumes the state."""
    return mixed_step(params, queue, state, capacity)


@functools.partial(jax.jit, static_argnames="capacity", donate_argnames="state")
def decode(params: Params, queue: Queue, state: State, capacity: Capacity) -> State:
    """Generate the next tokens; consumes the state."""
    return decode_steps(params, queue, state, capacity)


def stream(params: Params, tokens: Sequence[int], **options: Any) -> Iterator[StreamStep]:
    """Continue one prompt, token by token.

    Args:
      params: parameter tree.
      tokens: ids of the prompt.
      **options: those of `dsjax.generate`, but for `n`.

    Yields:
      New tokens as soon as the device has them; the last step says why the text ended.

    Raises:
      RequestError: what can not be served, with the remedy; before anything is compiled.
    """
    if options.get("n", 1) != 1:
        raise RequestError("stream follows one sequence; use generate for n > 1")
    queue, capacity = request(params, [list(tokens)], **options)
    return follow(params, queue, capacity)


def follow(params: Params, queue: Queue, capacity: Capacity) -> Iterator[StreamStep]:
    """The steps of a request that is laid out for one sequence, as `stream` yields them."""
    state = begin(params, queue, capacity)
    total = int(queue.lengths[0])
    read = given = 0
    finish = Finish.RUNNING
    while finish == Finish.RUNNING:
        state = (mixed if total - read > 1 else decode)(params, queue, state, capacity)
        length, finish, context = (
            int(x[0]) for x in jax.device_get((state.outputs.lengths, state.outputs.finish, state.slots.context))
        )
        finish = Finish(finish)
        read = total if length else context  # a finished sequence has left its slot
        new = slice(given, length)
        fresh, logprobs = (x[0, new].tolist() for x in jax.device_get((state.outputs.tokens, state.outputs.logprobs)))
        yield StreamStep(tokens=fresh, logprobs=logprobs, prompt_tokens_read=min(read, total), finish=finish)
        given = length
