"""Generation as a pure function: the scheduler's loop around the ragged forward pass, all of it on the device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.layers.linear import head
from dsjax.params import Params
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.schedule import admit, advance, has_prompts, plan, unfinished
from dsjax.ragged.state import FREE, Counters, Emitted, Finish, Outputs, Queue, Ranked, Slots, State, slot_sequences
from dsjax.request import Capacity, request
from dsjax.sampling import sample, top_logprobs
from dsjax.transformer import SCORE_ROWS, forward, ragged_rows
from pallas_kernels.dispatch import prefers_kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns; entries at and past a sequence's length are 0."""

    tokens: jax.Array  # int32[B, n, max_new_tokens], the stop id included
    lengths: jax.Array  # int32[B, n]
    logprobs: jax.Array  # float32[B, n, max_new_tokens], of each token under the model's own distribution
    finish: jax.Array  # int32[B, n], a `dsjax.Finish`
    sampling_logprobs: jax.Array | None  # float32[B, n, max_new_tokens], under the distribution sampled from
    counters: Counters  # steps and preemptions


def start(params: Params, queue: Queue, capacity: Capacity) -> State:
    """The state before the first step: empty pages, free slots, nothing generated."""
    sequences = queue.prompt.shape[0]
    room = (sequences, capacity.max_new_tokens)
    return State(
        pages=KVPages.zeros(params.config, capacity.pages, capacity.page_size, capacity.kv_dtype, capacity.groups),
        table=PageTable.empty(capacity.slots, capacity.pages_per_slot, capacity.pages, groups=capacity.groups.count),
        slots=Slots(jnp.full(capacity.slots, FREE, jnp.int32), jnp.zeros(capacity.slots, jnp.int32)),
        outputs=Outputs(
            tokens=jnp.zeros(room, jnp.int32),
            logprobs=jnp.zeros(room, jnp.float32),
            sampling_logprobs=jnp.zeros(room, jnp.float32) if capacity.with_distribution else None,
            lengths=jnp.zeros(sequences, jnp.int32),
            finish=jnp.where(queue.limits > 0, Finish.RUNNING, Finish.LENGTH).astype(jnp.int32),
        ),
        counters=Counters.zero(),
    )


def step(
    params: Params,
    queue: Queue,
    state: State,
    num_tokens: int,
    max_q_len: int | None = None,
    implementation: str | None = None,
    *,
    split_fuse: bool = True,
    alternatives: int | None = None,
) -> tuple[State, Emitted]:
    """One pass: plan, forward, sample, advance.

    Args:
      params: parameter tree.
      queue: the requests.
      state: donate it; every buffer is updated in place.
      num_tokens: tokens in the batch, at least the number of slots.
      max_q_len: 1 for a step that only decodes.
      implementation: backend of the kernels; see `forward`.
      split_fuse: see `plan`.
      alternatives: also rank generated and prompt tokens, beside so many of the likeliest, for requests that want it.

    Returns:
      The next state, and the tokens that came.
    """
    state, batch, logits, ranked_prompt = propose(
        params,
        queue,
        state,
        num_tokens,
        max_q_len,
        implementation,
        split_fuse=split_fuse,
        alternatives=alternatives,
    )
    state, emitted = settle(queue, state, batch, logits, alternatives)
    return state, dataclasses.replace(emitted, **ranked_prompt)


def propose(
    params: Params,
    queue: Queue,
    state: State,
    num_tokens: int,
    max_q_len: int | None,
    implementation: str | None,
    *,
    split_fuse: bool,
    alternatives: int | None,
) -> tuple[State, RaggedBatch, jax.Array, dict[str, Any]]:
    """The first half of `step`: the batch and the model's logits for it, `float32[S, V]`."""
    with jax.named_scope("plan"):
        # On a CPU a second pass of attention costs more, to compile and to run, than reading a prefix again.
        shares = prefers_kernels(implementation)
        state, batch = plan(queue, state, num_tokens, max_q_len, shares=shares, split_fuse=split_fuse)
    if alternatives is None or max_q_len == 1:
        logits, pages = forward(params, batch, state.pages, max_q_len=max_q_len, implementation=implementation)
        return dataclasses.replace(state, pages=pages), batch, logits, {}
    rows, pages = ragged_rows(params, batch, state.pages, max_q_len=max_q_len, implementation=implementation)
    logits = head(rows[batch.logit_rows], params, params.config, implementation)
    with jax.named_scope("rank_prompt"):
        ranked = _rank_prompt(params, queue, state, batch, rows, alternatives)
    return dataclasses.replace(state, pages=pages), batch, logits, ranked


def settle(
    queue: Queue,
    state: State,
    batch: RaggedBatch,
    logits: jax.Array,
    alternatives: int | None = None,
    changed: jax.Array | None = None,
) -> tuple[State, Emitted]:
    """The second half of `step`: sample, and take in what was sampled.

    Args:
      queue: the requests.
      state: as planned.
      batch: what was computed.
      logits: the model's, `float32[S, V]`.
      alternatives: see `step`.
      changed: logits to sample from, if they are not the model's.
    """
    with jax.named_scope("sample"):
        sequence = slot_sequences(state.slots, queue.prompt.shape[0])
        prompt = queue.prompt.at[sequence].get(mode="clip")
        generated = state.outputs.lengths.at[sequence].get(mode="clip")
        keys = queue.keys[prompt]
        for index in (queue.sample.at[sequence].get(mode="clip"), generated):
            keys = jax.vmap(jax.random.fold_in)(keys, index)
        vocab = logits.shape[-1]
        token, *drawn = sample(
            logits if changed is None else changed,
            jax.tree.map(lambda setting: setting[prompt], queue.sampling),
            keys,
            functools.partial(_history, queue, state.outputs, sequence, vocab),
            with_distribution=state.outputs.sampling_logprobs is not None,
            generated=generated,
            stop_ids=queue.stop_ids[prompt],
            new_tokens=functools.partial(_new_tokens, state.outputs, sequence, vocab),
            own=logits,
        )
    ranked = None
    if alternatives is not None and queue.wants_alternatives is not None:
        with jax.named_scope("rank"):
            wants = queue.wants_alternatives[prompt] & (sequence < queue.prompt.shape[0])
            ranked = _ranked(logits, token, alternatives, wants)
    with jax.named_scope("advance"):
        state, emitted = advance(queue, state, batch, state.pages, token, *drawn)
    return state, dataclasses.replace(emitted, ranked=ranked)


def _ranked(logits: jax.Array, token: jax.Array, count: int, wants: jax.Array) -> Ranked:
    """Where tokens stand among all; zeros where no row wants to know."""
    rows = logits.shape[0]

    def rank(logits):
        ids, logprobs, place = top_logprobs(logits, token, count)
        chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return Ranked(chosen, place, ids, logprobs)

    def nothing(_):
        zeros = jnp.zeros((rows, count))
        return Ranked(zeros[:, 0], jnp.zeros(rows, jnp.int32), zeros.astype(jnp.int32), zeros)

    return lax.cond(jnp.any(wants), rank, nothing, logits)


def _rank_prompt(params: Params, queue: Queue, state: State, batch: RaggedBatch, rows, count: int) -> dict[str, Any]:
    """Log-probabilities of the prompt tokens that follow those in the batch, a block of rows at a time."""
    assert queue.wants_prompt is not None
    sequence = slot_sequences(state.slots, queue.prompt.shape[0])
    owner = sequence.at[batch.slot_of_token].get(mode="fill", fill_value=queue.prompt.shape[0])
    prompt = queue.prompt.at[owner].get(mode="fill", fill_value=0)
    following = batch.positions + 1
    wants = (owner < queue.prompt.shape[0]) & queue.wants_prompt[prompt] & (following < queue.lengths[prompt])
    token = queue.tokens.at[queue.offsets[prompt] + following].get(mode="clip")
    size = min(SCORE_ROWS, rows.shape[0])
    padding = -rows.shape[0] % size

    def block(part):
        x, token, wants = part
        return _ranked(head(x, params, params.config), token, count, wants)

    blocks = [
        jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        for x in (rows, token, wants)
    ]
    ranked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: rows.shape[0]], lax.map(block, tuple(blocks)))
    place = jnp.stack([jnp.where(wants, owner, queue.prompt.shape[0]), following], axis=1)
    return {"prompt_place": place, "prompt_ranked": ranked}


def _new_tokens(outputs: Outputs, sequence: jax.Array, vocab: int) -> jax.Array:
    """Generated tokens of each slot, `int32[S, C]`, `vocab` where there is none."""
    tokens = outputs.tokens.at[sequence].get(mode="clip")
    written = jnp.arange(tokens.shape[1]) < outputs.lengths.at[sequence].get(mode="clip")[:, None]
    return jnp.where(written, tokens, vocab)


def _history(queue: Queue, outputs: Outputs, sequence: jax.Array, vocab: int) -> jax.Array:
    """Known tokens of each slot, `int32[S, C]`, `vocab` where there is none."""
    prompt = queue.prompt.at[sequence].get(mode="clip")
    room = queue.tokens.shape[0] // queue.lengths.shape[0]
    place = jnp.arange(room)
    prompt_tokens = queue.tokens.at[queue.offsets[prompt][:, None] + place].get(mode="clip")
    prompt_tokens = jnp.where(place < queue.lengths[prompt][:, None], prompt_tokens, vocab)
    return jnp.concatenate([prompt_tokens, _new_tokens(outputs, sequence, vocab)], axis=1)


def mixed_step(params: Params, queue: Queue, state: State, capacity: Capacity) -> State:
    """A pass with room for prompts, then admission, so that slots and prompts that it freed are used by the next."""
    state, _ = step(params, queue, state, capacity.token_budget, implementation=capacity.implementation)
    return admit(queue, state)


def decode_steps(params: Params, queue: Queue, state: State, capacity: Capacity) -> State:
    """`steps_per_sync` passes of one token a slot, then admission.

    The number of passes is known when the program is compiled, so a GPU's host does not wait for each.
    """

    def body(_, state):
        return step(params, queue, state, capacity.slots, max_q_len=1, implementation=capacity.implementation)[0]

    return admit(queue, lax.fori_loop(0, capacity.steps_per_sync, body, state))


@functools.partial(jax.jit, static_argnames="capacity")
def _generate(params: Params, queue: Queue, capacity: Capacity) -> Generation:
    def reads(state):
        return has_prompts(queue, state)

    def decodes(state):
        return unfinished(state) & ~reads(state)

    def round_of_steps(state):
        state = lax.while_loop(reads, lambda state: mixed_step(params, queue, state, capacity), state)
        return lax.while_loop(decodes, lambda state: decode_steps(params, queue, state, capacity), state)

    state = lax.while_loop(unfinished, round_of_steps, admit(queue, start(params, queue, capacity)))
    outputs = state.outputs
    by_prompt = jax.tree.map(lambda x: x.reshape(-1, capacity.samples, *x.shape[1:]), outputs)
    return Generation(
        tokens=by_prompt.tokens,
        lengths=by_prompt.lengths,
        logprobs=by_prompt.logprobs,
        finish=by_prompt.finish,
        sampling_logprobs=by_prompt.sampling_logprobs,
        counters=state.counters,
    )


def generate(
    params: Params,
    tokens: Any,
    lengths: Any = None,
    *,
    max_new_tokens: int,
    limits: Any = None,
    key: Any = None,
    temperature: Any = 0.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    logit_bias: Any = None,
    stop_ids: Any = (),
    ignore_eos: Any = False,
    n: int = 1,
    slots: int | None = None,
    pages: int | None = None,
    page_size: int = 64,
    token_budget: int | None = None,
    steps_per_sync: int | None = None,
    kv_dtype: Any = None,
    return_sampling_logprobs: bool = False,
    implementation: str | None = None,
) -> Generation:
    """Continue prompts: continuous batching over paged memory, inside one pure function.

    Traceable: it works under a caller's `jit` and under a mesh. New parameter values, lengths, keys and sampling
    settings run the same compiled program. A sequence's tokens and log-probabilities depend on its prompt, settings and
    key alone, not on what else is in the batch, nor on slots, pages or budget. Samples of one prompt share its pages.

    Args:
      params: parameter tree, fused (`dsjax.prepare`) or not.
      tokens: lists of token ids, or right-padded `int32[B, L]`.
      lengths: `int32[B]`, prompt lengths of an array; default all `L`.
      max_new_tokens: room for new tokens; static.
      limits: `int32[B]` or one, most new tokens of a request, at most `max_new_tokens`, which is the default.
      key: a PRNG key, of which request `b` gets `fold_in(key, b)`, or one key for each request. Sample `i` of a request
        draws its token `t` with `fold_in(fold_in(request's key, i), t)`.
      temperature: one or `[B]`; 0 is greedy.
      top_k: one or `[B]`; only the `top_k` likeliest tokens are drawn; 0 is off.
      top_p: one or `[B]`; only the likeliest tokens that together have this probability; 1 is off.
      min_p: one or `[B]`; only tokens at least `min_p` times as likely as the likeliest; 0 is off.
      repetition_penalty: one or `[B]`, over the prompt and what was generated (arXiv 1909.05858); 1 is off.
      logit_bias: `float32[V]` or `[B, V]`, added to the logits first.
      stop_ids: ids that end a request besides the model's own, `[E]` or `[B, E]` padded with -1.
      ignore_eos: one or `[B]`; leave out the model's own stop ids.
      n: samples of each prompt; static.
      slots: sequences that run at once, default all up to 64; static.
      pages: pages in the pool, default enough for all slots; static. With fewer, sequences wait, and the newest are
        put back and computed again when pages run out.
      page_size: tokens a page; static.
      token_budget: tokens of a step that reads prompts, default all prompt tokens up to 512; static.
      steps_per_sync: decode steps between two looks at the queue, default 1 on a CPU and 16 elsewhere; static.
      kv_dtype: of the pages, default the embedding's; int8 and `"fp8"` halve them, with a scale for each token and
        head; static.
      return_sampling_logprobs: also keep log-probabilities under the distribution that was sampled from; static.
      implementation: backend of the kernels, `"mosaic"`, `"triton"`, `"xla"` or `"reference"`, default the best that
        the GPU runs; static. On a CPU that is `"xla"`, and `"triton"` is interpreted, for tests.

    Returns:
      Tokens, lengths, log-probabilities and why each sequence stopped.

    Raises:
      RequestError: what can not be served, with the remedy.
      ParameterError: the tree does not fit its config.
    """
    queue, capacity = request(**locals())
    return _generate(params, queue, capacity)
