"""What the engine runs on the device: the scheduler's steps, and what puts requests into its state.

Sizes and the architecture are static; everything else is data. There are few programs, all compiled before the first
request: one that takes in requests, a step that reads prompts, and a call of several steps that only decode. On a GPU
the last two exist twice, without and with what few requests ask for (penalties, constraints, rankings).
"""

import dataclasses
import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.config import ModelConfig
from dsjax.generation import propose, settle, step
from dsjax.params import Params
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.groups import PageGroups, pages_for
from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.prefix import Prefixes
from dsjax.ragged.schedule import admit, give_back_unseen, pending_tokens
from dsjax.ragged.state import FREE, HELD, Counters, Emitted, Finish, Outputs, Queue, Sampling, Slots, State
from dsjax.transformer import forward

STATUS = ("pending", "running", "waiting", "free_pages", "preemptions", "computed", "found", "asked")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of an engine: what its programs are compiled for.

    Attributes:
      slots: sequences that run at once (S).
      rows: sequences that the device knows of, running or waiting (R).
      pages: pages in the pool (P).
      page_size: tokens a page (p).
      groups: the layers that share pages.
      token_budget: tokens of a step that reads prompts (T); a step that only decodes has `slots`.
      max_context: most tokens of a sequence, prompt included (C).
      steps_per_sync: decode steps of one call.
      packet_tokens: prompt tokens that one packet brings (U).
      packet_prompts: prompts that one packet completes (A).
      stop_ids: ids that end a sequence, at most (E).
      biased_tokens: tokens of a request that `logit_bias` names, at most.
      alternatives: likeliest tokens that are ranked, at most (K).
      kv_dtype: name of the dtype of the pages.
      prefix_caching: find pages again by the text that they hold.
      split_fuse: see `plan`.
      always_full: run the programs with all features only; right where skipping a feature costs nothing.
      implementation: backend of the kernels, `None` for the best.
    """

    slots: int
    rows: int
    pages: int
    page_size: int
    groups: PageGroups
    token_budget: int
    max_context: int
    steps_per_sync: int
    packet_tokens: int
    packet_prompts: int
    stop_ids: int
    biased_tokens: int
    alternatives: int
    kv_dtype: str
    prefix_caching: bool
    split_fuse: bool
    always_full: bool
    implementation: str | None

    @property
    def pages_per_slot(self) -> int:
        """Pages that the longest sequence fills, of each group of layers (M); its last token is never read again."""
        return pages_for(self.max_context - 1, self.page_size)


# Columns of the packet: what the host says of each row, in one array, since a transfer costs by the array.
_INTEGERS = ("length", "limit", "order", "prompt", "sample", "flags", "top_k", "min_tokens", "salt", "seed")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
FLAGS = {name: 1 << bit for bit, name in enumerate(("begins", "starts", "ends", "alternatives", "prompt", "seeded"))}


def packet_dtype(sizes: Sizes) -> np.dtype:
    """One row of the packet, as the host sees it.

    `flags`: the first piece of the row's prompt is in this packet (`begins`); its prompt is whole, and it may run
    (`starts`); it is taken back (`ends`); it wants likely tokens beside its own (`alternatives`), or its prompt's
    log-probabilities (`prompt`); its key is made of its seed (`seeded`), else of its seed and the engine's.
    """
    fields = [(name, np.int32) for name in _INTEGERS] + [(name, np.float32) for name in _FLOATS]
    return np.dtype([*fields, ("stop_ids", np.int32, (sizes.stop_ids,))])


def empty_queue(config: ModelConfig, sizes: Sizes) -> Queue:
    """No requests."""
    rows = jnp.arange(sizes.rows, dtype=jnp.int32)
    words = -(-config.vocab_size // 32)

    def full(value, *shape):
        return jnp.full((sizes.rows, *shape), value)

    return Queue(
        tokens=jnp.zeros(sizes.rows * sizes.max_context, jnp.int32),
        offsets=rows * sizes.max_context,
        lengths=jnp.ones(sizes.rows, jnp.int32),
        keys=jax.random.split(jax.random.key(0), sizes.rows),
        sampling=Sampling(
            temperature=full(0.0),
            top_k=full(0),
            top_p=full(1.0),
            min_p=full(0.0),
            repetition_penalty=full(1.0),
            presence_penalty=full(0.0),
            frequency_penalty=full(0.0),
            min_tokens=full(0),
            bias_ids=full(-1, sizes.biased_tokens),
            bias_values=full(0.0, sizes.biased_tokens),
            allowed=full(np.uint32(0xFFFFFFFF), words),
        ),
        stop_ids=full(-1, sizes.stop_ids),
        prompt=rows,
        sample=jnp.zeros_like(rows),
        limits=jnp.zeros_like(rows),
        order=rows,
        salt=jnp.zeros(sizes.rows, jnp.uint32),
        wants_alternatives=full(False),
        wants_prompt=full(False),
    )


def empty_state(config: ModelConfig, sizes: Sizes) -> State:
    """Empty pages, free slots."""
    prefixes = Prefixes.empty(sizes.rows, sizes.pages_per_slot, sizes.pages) if sizes.prefix_caching else None
    groups = sizes.groups
    return State(
        pages=KVPages.zeros(config, sizes.pages, sizes.page_size, sizes.kv_dtype, groups),
        table=PageTable.empty(sizes.slots, sizes.pages_per_slot, sizes.pages, sizes.prefix_caching, groups.count),
        slots=Slots(jnp.full(sizes.slots, FREE, jnp.int32), jnp.zeros(sizes.slots, jnp.int32)),
        outputs=Outputs(
            tokens=jnp.zeros((sizes.rows, sizes.max_context), jnp.int32),
            logprobs=None,
            sampling_logprobs=None,
            lengths=jnp.zeros(sizes.rows, jnp.int32),
            finish=jnp.full(sizes.rows, Finish.ABORTED, jnp.int32),
        ),
        counters=Counters.zero(),
        prefixes=prefixes,
    )


def submit(
    queue: Queue,
    state: State,
    packet: jax.Array,
    tokens: jax.Array,
    complete: jax.Array,
    key: jax.Array,
    *,
    sizes,
):
    """Take in what the host has to say, then admit.

    Args:
      queue: the requests; donated.
      state: donated.
      packet: `int32[R, W]`, rows of `packet_dtype`.
      tokens: `int32[3, U]`, pieces of prompts: token, row (R for none), position.
      complete: `int32[A]`, rows whose prompts are now whole, R for none.
      key: the engine's; requests without a seed get keys made of it.
      sizes: the engine's.
    """
    columns = {name: packet[:, i] for i, name in enumerate(_INTEGERS)}
    columns |= {
        name: lax.bitcast_convert_type(packet[:, len(_INTEGERS) + i], jnp.float32) for i, name in enumerate(_FLOATS)
    }
    flag = {name: columns["flags"] & bit != 0 for name, bit in FLAGS.items()}
    token, row, position = tokens
    own = jax.vmap(jax.random.key)(columns["seed"].astype(jnp.uint32))
    engines = jax.vmap(functools.partial(jax.random.fold_in, key))(columns["seed"])
    salt = columns["salt"].astype(jnp.uint32)
    queue = replace(
        queue,
        tokens=queue.tokens.at[row * sizes.max_context + position].set(token, mode="drop"),
        lengths=columns["length"],
        keys=jnp.where(flag["seeded"], own, engines),
        sampling=replace(
            queue.sampling,
            **{name: columns[name] for name in ("top_k", "min_tokens", *_FLOATS)},
        ),
        stop_ids=packet[:, len(_INTEGERS) + len(_FLOATS) :],
        prompt=columns["prompt"],
        sample=columns["sample"],
        limits=columns["limit"],
        order=columns["order"],
        salt=salt,
        wants_alternatives=flag["alternatives"],
        wants_prompt=flag["prompt"],
    )
    outputs = state.outputs
    finish = jnp.where(flag["ends"] & (outputs.finish == Finish.RUNNING), Finish.ABORTED, outputs.finish)
    outputs = replace(
        outputs,
        lengths=jnp.where(flag["starts"], 0, outputs.lengths),
        finish=jnp.where(flag["starts"], Finish.RUNNING, finish).astype(jnp.int32),
    )
    sequence = state.slots.sequence
    ended = (sequence >= 0) & (finish.at[sequence].get(mode="clip") == Finish.ABORTED)
    prefixes = state.prefixes
    if prefixes is not None:
        texts = jnp.where(flag["begins"][:, None, None], 0, prefixes.of_text)
        prefixes = replace(prefixes, of_text=texts).enter(
            row, position, token, salt.at[row].get(mode="fill", fill_value=0), complete, sizes.page_size
        )
        texts = prefixes.of_text
        prefixes = replace(prefixes, of_text=jnp.where(flag["starts"][:, None, None], texts[queue.prompt], texts))
    state = replace(
        state,
        table=state.table.release(ended),
        slots=Slots(jnp.where(ended, FREE, sequence), jnp.where(ended, 0, state.slots.context)),
        outputs=outputs,
        prefixes=prefixes,
    )
    return queue, admit(queue, state)


def constrain(queue: Queue, row: jax.Array, bias_ids: jax.Array, bias_values: jax.Array, allowed: jax.Array) -> Queue:
    """Set a row's logit bias and allowed tokens; see `Sampling`."""
    sampling = queue.sampling
    assert sampling.bias_ids is not None and sampling.bias_values is not None and sampling.allowed is not None
    return replace(
        queue,
        sampling=replace(
            sampling,
            bias_ids=sampling.bias_ids.at[row].set(bias_ids),
            bias_values=sampling.bias_values.at[row].set(bias_values),
            allowed=sampling.allowed.at[row].set(allowed),
        ),
    )


_RARE = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "bias_ids",
    "bias_values",
    "allowed",
)


def _plain(queue: Queue) -> Queue:
    """The queue as a program sees it that knows of no rare features."""
    return replace(queue, sampling=replace(queue.sampling, **dict.fromkeys(_RARE)))


def call(params: Params, queue: Queue, state: State, *, sizes: Sizes, decodes: bool, full: bool):
    """One call of the device: a step that reads prompts, or several that only decode; then admission.

    Returns:
      The state; one array with everything that every request needs; and what a `full` program ranks.
    """
    options: dict[str, Any] = {
        "implementation": sizes.implementation,
        "split_fuse": sizes.split_fuse,
        "alternatives": sizes.alternatives if full else None,
    }
    seen = queue if full else _plain(queue)
    if decodes:

        def one(state, _):
            return step(params, seen, state, sizes.slots, 1, **options)

        state, emitted = lax.scan(one, state, length=sizes.steps_per_sync)
    else:
        state, emitted = step(params, seen, state, sizes.token_budget, **options)
        emitted = jax.tree.map(lambda x: x[None], emitted)
    state = admit(queue, state)
    return state, _pack(queue, state, emitted), (emitted.ranked, emitted.prompt_place, emitted.prompt_ranked)


def _pack(queue: Queue, state: State, emitted: Emitted) -> jax.Array:
    """`int32[k * 4 * S + 8 + R]`: what `unpack` gives."""
    logprob = lax.bitcast_convert_type(emitted.logprob, jnp.int32)
    steps = jnp.stack([emitted.sequence, emitted.token, logprob, emitted.finish], axis=1)
    pending = pending_tokens(queue, state)
    running = jnp.sum(state.slots.sequence >= 0)
    counts = {
        "pending": jnp.sum(jnp.where(pending > 1, pending, 0)),
        "running": running,
        "waiting": jnp.sum(state.outputs.finish == Finish.RUNNING) - running,
        "free_pages": state.table.num_free,
        "preemptions": state.counters.preemptions,
        "computed": state.counters.tokens,
        "found": 0 if state.prefixes is None else state.prefixes.found,
        "asked": 0 if state.prefixes is None else state.prefixes.asked,
    }
    status = jnp.stack([jnp.asarray(counts[name], jnp.int32) for name in STATUS])
    cached = jnp.zeros_like(state.outputs.lengths) if state.prefixes is None else state.prefixes.cached
    return jnp.concatenate([steps.reshape(-1), status, cached])


def unpack(packed: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, dict[str, int], np.ndarray]:
    """What `call` packed.

    Returns:
      `int32[k, 4, S]`, of each step and slot sequence, token, log-probability's bits and finish; the status; and
      `int32[R]`, how many tokens of each prompt were found in the prefix cache.
    """
    steps, status, cached = np.split(packed, [len(packed) - sizes.rows - len(STATUS), len(packed) - sizes.rows])
    return steps.reshape(-1, 4, sizes.slots), dict(zip(STATUS, status.tolist(), strict=True)), cached


def look(params: Params, queue: Queue, state: State, *, sizes: Sizes):
    """The first half of a step, for processors of logits on the host.

    Returns:
      The state, the batch, the model's logits `float32[S, V]`, and places and rankings of prompt tokens.
    """
    state, batch, logits, ranked = propose(
        params,
        queue,
        state,
        sizes.token_budget,
        None,
        sizes.implementation,
        split_fuse=sizes.split_fuse,
        alternatives=sizes.alternatives,
    )
    ranked = jax.tree.map(lambda x: x[None], (ranked["prompt_place"], ranked["prompt_ranked"]))
    return state, batch, logits, ranked


def conclude(
    queue: Queue,
    state: State,
    batch: RaggedBatch,
    logits: jax.Array,
    changed: jax.Array,
    *,
    sizes: Sizes,
):
    """The second half: sample from logits that the host has changed, then admission."""
    state, emitted = settle(queue, state, batch, logits, sizes.alternatives, changed)
    emitted = jax.tree.map(lambda x: x[None], emitted)
    state = admit(queue, state)
    return state, _pack(queue, state, emitted), emitted.ranked


def compute(params: Params, state: State, batch: dict[str, jax.Array], *, sizes: Sizes, decodes: bool):
    """A pass over sequences whose tokens the caller gives: the original's `put`.

    Args:
      params: parameter tree.
      state: donated.
      batch: `tokens`, `positions`, `slot_of_token` `[T]`, `cu_q_lens [S + 1]`, `new_pages [S]` of each
        group.
      sizes: the engine's.
      decodes: no slot has more than one token.

    Returns:
      The state, and logits of each slot's last token `float32[S, V]`.
    """
    q_lens = batch["cu_q_lens"][1:] - batch["cu_q_lens"][:-1]
    takes = q_lens > 0
    most = sizes.slots + len(batch["tokens"]) // sizes.page_size
    table = state.table.extend(batch["new_pages"], most)
    context = state.slots.context + q_lens
    logits, pages = forward(
        params,
        RaggedBatch(
            tokens=batch["tokens"],
            positions=batch["positions"],
            slot_of_token=batch["slot_of_token"],
            cu_q_lens=batch["cu_q_lens"],
            kv_lens=jnp.where(takes, context, 0),
            page_table=table.table,
            logit_rows=jnp.maximum(batch["cu_q_lens"][1:] - 1, 0),
            final_lens=jnp.full(sizes.slots, sizes.max_context, jnp.int32),
        ),
        state.pages,
        max_q_len=1 if decodes else None,
        implementation=sizes.implementation,
    )
    slots = Slots(jnp.where(takes, HELD, state.slots.sequence), context)
    table = give_back_unseen(table, context, takes, sizes.groups, sizes.page_size)
    return replace(state, pages=pages, table=table, slots=slots), logits


def flush(state: State, slots: jax.Array) -> State:
    """Give back what slots hold, `bool[S]`, that the scheduler knows nothing of."""
    return replace(
        state,
        table=state.table.release(slots),
        slots=Slots(jnp.where(slots, FREE, state.slots.sequence), jnp.where(slots, 0, state.slots.context)),
    )


def restart(state: State, texts: jax.Array, lengths: jax.Array, salts: jax.Array, *, sizes: Sizes) -> State:
    """Compute all sequences again in new, empty pages.

    Args:
      state: with the outputs so far; everything else of it is empty.
      texts: `int32[R, C]`, prompt and what was generated, of each row.
      lengths: `int32[R]`.
      salts: `uint32[R]`.
      sizes: the engine's.
    """
    if state.prefixes is None:
        return state
    width = sizes.pages_per_slot * sizes.page_size
    texts = jnp.pad(texts, ((0, 0), (0, max(0, width - texts.shape[1]))))[:, :width]
    return replace(state, prefixes=state.prefixes.enter_whole(texts, lengths, salts))
