"""What a run of the scheduler carries from step to step, all of it visible.

A *sequence* is one sample of one prompt. Its text is never stored twice: the prompt stands in the queue, what was
generated in the outputs, and a slot knows only which sequence it runs and how many of its keys are written. So taking a
sequence out of its slot (preemption) forgets nothing but keys, and these are computed again.
"""

import dataclasses
from enum import IntEnum

import jax
import jax.numpy as jnp

from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.prefix import Prefixes


class Finish(IntEnum):
    """Why a sequence ended."""

    RUNNING = 0  # it has not
    STOP = 1  # it generated a stop id
    LENGTH = 2  # it reached its limit of new tokens, or the model's context
    ABORTED = 3  # the engine took it back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, for each prompt or, gathered, for each slot."""

    temperature: jax.Array  # float32[B], 0 is greedy
    top_k: jax.Array  # int32[B], 0 is off
    top_p: jax.Array  # float32[B], 1 is off
    min_p: jax.Array  # float32[B], 0 is off
    repetition_penalty: jax.Array | None  # float32[B], 1 is off
    logit_bias: jax.Array | None = None  # float32[B, V]
    # What only some programs of the engine have; `None` where no request can ask for it.
    presence_penalty: jax.Array | None = None  # float32[B], 0 is off
    frequency_penalty: jax.Array | None = None  # float32[B], 0 is off
    min_tokens: jax.Array | None = None  # int32[B], no stop id is drawn before so many
    bias_ids: jax.Array | None = None  # int32[B, E], tokens whose logit is changed, -1 where there is none
    bias_values: jax.Array | None = None  # float32[B, E], by how much
    allowed: jax.Array | None = None  # uint32[B, ceil(V / 32)], a bit for each token that may be drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """What is asked for: prompts, and the sequences that are wanted of them."""

    tokens: jax.Array  # int32[B * L], prompts one after the other
    offsets: jax.Array  # int32[B], where each begins
    lengths: jax.Array  # int32[B], prompt tokens
    keys: jax.Array  # key[B]
    sampling: Sampling
    stop_ids: jax.Array  # int32[B, E], -1 where there is none
    prompt: jax.Array  # int32[Q], prompt of each sequence
    sample: jax.Array  # int32[Q], which sample of that prompt it is
    limits: jax.Array  # int32[Q], most tokens to generate
    order: jax.Array  # int32[Q], all different; the lowest is served first and preempted last
    salt: jax.Array | None = None  # uint32[B], prompts with different ones share no pages; for prefix caching
    wants_alternatives: jax.Array | None = None  # bool[B], the likeliest tokens beside each generated one
    wants_prompt: jax.Array | None = None  # bool[B], log-probabilities of the prompt's own tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What came out so far."""

    tokens: jax.Array  # int32[Q, max_new_tokens]
    logprobs: jax.Array | None  # float32[Q, max_new_tokens], under the model's own distribution; if kept here
    sampling_logprobs: jax.Array | None  # float32[Q, max_new_tokens], under the distribution sampled from
    lengths: jax.Array  # int32[Q], tokens generated
    finish: jax.Array  # int32[Q], a `Finish`


FREE = -1
HELD = -2  # by a sequence that the scheduler knows nothing of: its caller says what is computed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The places in a batch."""

    sequence: jax.Array  # int32[S], or `FREE`, or `HELD`
    context: jax.Array  # int32[S], tokens whose keys are written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """What the scheduler did."""

    mixed_steps: jax.Array  # int32, steps with room for prompts
    decode_steps: jax.Array  # int32, steps of one token a slot
    preemptions: jax.Array  # int32, sequences put back for want of pages
    tokens: jax.Array  # int32, computed, those of prompts and those computed again included

    @classmethod
    def zero(cls) -> "Counters":
        """Nothing done."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in dataclasses.fields(cls)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes; its buffers are donated to the step and come back updated."""

    pages: KVPages
    table: PageTable
    slots: Slots
    outputs: Outputs
    counters: Counters
    prefixes: Prefixes | None = None  # for prefix caching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranked:
    """Log-probabilities of chosen tokens beside those of the likeliest, under the model's own distribution."""

    chosen: jax.Array  # float32[N]
    rank: jax.Array  # int32[N], 1 for the likeliest
    tokens: jax.Array  # int32[N, K], the likeliest first
    logprobs: jax.Array  # float32[N, K]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one step gave, slot by slot."""

    sequence: jax.Array  # int32[S], that got a token, Q where none did
    token: jax.Array  # int32[S]
    logprob: jax.Array  # float32[S], under the model's own distribution
    finish: jax.Array  # int32[S], a `Finish`
    ranked: Ranked | None = None  # of the tokens, [S]
    prompt_place: jax.Array | None = None  # int32[T, 2], sequence and position of each prompt token; Q where none
    prompt_ranked: Ranked | None = None  # of these, [T]


def slot_sequences(slots: Slots, num_sequences: int) -> jax.Array:
    """Sequence of each slot, `Q` (out of range) for free ones, so that scatters drop and gathers can fill."""
    return jnp.where(slots.sequence < 0, num_sequences, slots.sequence)


def known_tokens(queue: Queue, outputs: Outputs) -> jax.Array:
    """Tokens of each sequence that exist: its prompt and what it generated, `int32[Q]`."""
    return queue.lengths[queue.prompt] + outputs.lengths
