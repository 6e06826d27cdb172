"""The scheduler: admission, Dynamic SplitFuse, growth, preemption and completion, as pure functions on the device.

Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671): running sequences get their one token first, and the rest of
the token budget is filled with pieces of waiting prompts, so that every pass has about the same size.

Sequences are served in their `order`. One is admitted when pages for all its known tokens are free and one more remains
for each that runs; while it runs it takes a page at a time. When none is left the newest one gives all of its pages
back and waits to be computed again: the oldest always goes on, so the queue always advances.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.state import Finish, Outputs, Queue, Slots, State, known_tokens, slot_sequences
from pallas_kernels.ragged_paged_attention import shared_prefixes

NEVER = jnp.iinfo(jnp.int32).max


def pages_for(tokens, page_size: int):
    """Pages that hold so many tokens."""
    return (tokens + page_size - 1) // page_size


def unfinished(state: State) -> jax.Array:
    """Whether any sequence still has to generate."""
    return jnp.any(state.outputs.finish == Finish.RUNNING)


def pending_tokens(queue: Queue, state: State) -> Int[Array, "S"]:
    """Known tokens of each slot whose keys are not written: 1 while it decodes, more while its prompt is read."""
    known = known_tokens(queue, state.outputs)
    sequence = slot_sequences(state.slots, known.shape[0])
    return known.at[sequence].get(mode="fill", fill_value=0) - state.slots.context


def has_prompts(queue: Queue, state: State) -> jax.Array:
    """Whether any slot has more than one token to compute."""
    return jnp.any(pending_tokens(queue, state) > 1)


def admit(queue: Queue, state: State) -> State:
    """Move waiting sequences into free slots, as many as slots and pages allow, in order.

    The first sample of a prompt reads it. Others wait until it has, then share its full pages by reference, get a copy
    of the page that they will write to, and begin at the prompt's last token, whose logits they need. A sequence that
    came back from preemption is treated alike.
    """
    table, slots, outputs = state.table, state.slots, state.outputs
    (num_slots, pages_per_slot), total_pages = table.table.shape, table.ref_counts.shape[0]
    num_prompts, num_sequences = queue.lengths.shape[0], queue.prompt.shape[0]
    page_size = state.pages.page_size
    slot_ids = jnp.arange(num_slots)

    sequence = slot_sequences(slots, num_sequences)
    running = jnp.zeros(num_sequences, bool).at[sequence].set(True, mode="drop")
    waiting = ~running & (outputs.finish == Finish.RUNNING)

    # For each prompt: a slot that has read it (the donor), whether any slot runs it, and its first waiting sequence.
    slot_prompt = queue.prompt.at[sequence].get(mode="fill", fill_value=num_prompts)
    has_read = slots.context >= queue.lengths.at[slot_prompt].get(mode="fill", fill_value=NEVER) - 1
    donor_of_prompt = jnp.full(num_prompts, -1).at[slot_prompt].max(jnp.where(has_read, slot_ids, -1), mode="drop")
    is_run = jnp.zeros(num_prompts, bool).at[slot_prompt].set(True, mode="drop")
    first = jnp.full(num_prompts, NEVER).at[queue.prompt].min(jnp.where(waiting, queue.order, NEVER))
    has_donor = donor_of_prompt[queue.prompt] >= 0
    leads = ~is_run[queue.prompt] & (queue.order == first[queue.prompt])
    eligible = waiting & (has_donor | leads)

    # Candidates in order, one for each free slot.
    count = min(num_slots, num_sequences)
    candidate = jnp.argsort(jnp.where(eligible, queue.order, NEVER))[:count]
    prompt_len = queue.lengths[queue.prompt[candidate]]
    donor = donor_of_prompt[queue.prompt[candidate]]
    forks = donor >= 0
    held = pages_for(known_tokens(queue, outputs)[candidate], page_size)
    shared = jnp.where(forks, (prompt_len - 1) // page_size, 0)
    new = jnp.where(eligible[candidate], held - shared, 0)
    free_slot = jnp.nonzero(slots.sequence < 0, size=count, fill_value=num_slots)[0]
    company = jnp.sum(slots.sequence >= 0) + jnp.arange(count)
    fits = jnp.cumsum(new) + company <= table.num_free
    admitted = jnp.cumprod(eligible[candidate] & fits & (free_slot < num_slots)).astype(bool)

    # Rows of pages: the donor's first `shared`, then new ones from the free list.
    column = jnp.arange(pages_per_slot)
    donor_row = table.table[jnp.maximum(donor, 0)]
    place = (jnp.cumsum(new) - new - shared)[:, None] + column
    fresh = table.free_list(total_pages).at[place].get(mode="fill", fill_value=total_pages)
    rows = jnp.where(column < shared[:, None], donor_row, fresh)
    rows = jnp.where(column < held[:, None], rows, total_pages)
    target = jnp.where(admitted, free_slot, num_slots)

    # The page that a fork will write to begins with prompt tokens of the donor's, unless it begins at the last token.
    copies = admitted & forks & ((prompt_len - 1) % page_size > 0)
    copied_first = jnp.argsort(~copies)
    source_page, target_page = (jnp.take_along_axis(part, shared[:, None], axis=1)[:, 0] for part in (donor_row, rows))
    pages = state.pages.copy(source_page[copied_first], target_page[copied_first], jnp.sum(copies))

    return State(
        pages=pages,
        table=table.assign(target, rows),
        slots=Slots(
            sequence=slots.sequence.at[target].set(candidate.astype(jnp.int32), mode="drop"),
            context=slots.context.at[target].set(jnp.where(forks, prompt_len - 1, 0), mode="drop"),
        ),
        outputs=outputs,
        counters=state.counters,
    )


def _grow(table: PageTable, needy: jax.Array, active: jax.Array, order: jax.Array):
    """A page for each needy slot, oldest first; when they run out the newest slot is preempted.

    Returns:
      The table, which slots are preempted (at most one), and which got nothing and must pause for this step.
    """
    short = jnp.sum(needy) > table.num_free
    newest = jnp.argmax(jnp.where(active, order, -1))
    preempted = short & (jnp.sum(active) > 1) & (jnp.arange(active.shape[0]) == newest)
    table = table.release(preempted)
    needy &= ~preempted
    older_and_needy = needy & (order < order[:, None])
    table, granted = table.grant(needy, jnp.sum(older_and_needy, axis=1, dtype=jnp.int32))
    return table, preempted, needy & ~granted


def plan(
    queue: Queue, state: State, num_tokens: int, max_q_len: int | None = None, shares: bool = False
) -> tuple[State, RaggedBatch]:
    """Decide what the next forward pass computes.

    Args:
      queue: the requests.
      state: pages for the tokens planned are taken from it.
      num_tokens: tokens in the batch (T), at least the number of slots.
      max_q_len: most tokens a slot, 1 for a step that only decodes.
      shares: also find which slots begin with the same pages, for attention to read those once.

    Returns:
      The state with pages granted and, if they ran out, the newest sequence preempted; and the batch.
    """
    num_slots = state.slots.sequence.shape[0]
    num_sequences = queue.prompt.shape[0]
    sequence = slot_sequences(state.slots, num_sequences)
    active = state.slots.sequence >= 0
    order = queue.order.at[sequence].get(mode="fill", fill_value=NEVER)
    pending = pending_tokens(queue, state)
    needy = active & (pages_for(pending + state.slots.context, state.pages.page_size) > state.table.num_pages)
    table, preempted, paused = _grow(state.table, needy, active, order)

    slots = Slots(
        sequence=jnp.where(preempted, -1, state.slots.sequence), context=jnp.where(preempted, 0, state.slots.context)
    )
    ready = jnp.where(active & ~preempted & ~paused, pending, 0)
    decoding = ready == 1
    reading = jnp.where(decoding, 0, ready)
    left = num_tokens - jnp.sum(decoding) - jnp.sum(jnp.where(order < order[:, None], reading, 0), axis=1)
    q_lens = jnp.where(decoding, 1, jnp.clip(left, 0, reading))
    if max_q_len is not None:
        q_lens = jnp.minimum(q_lens, max_q_len)

    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    row = jnp.arange(num_tokens)
    slot = jnp.searchsorted(cu_q_lens[1:], row, side="right", method="compare_all").astype(jnp.int32)
    is_real = slot < num_slots
    position = slots.context.at[slot].get(mode="clip") + row - cu_q_lens.at[slot].get(mode="clip")
    position = jnp.where(is_real, position, 0)
    kv_lens = jnp.where(q_lens > 0, slots.context + q_lens, 0)
    shares &= num_sequences > queue.lengths.shape[0]  # several samples of a prompt hold the same pages of it
    batch = RaggedBatch(
        tokens=jnp.where(is_real, _tokens_at(queue, state.outputs, sequence.at[slot].get(mode="clip"), position), 0),
        positions=position,
        slot_of_token=slot,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        page_table=table.table,
        logit_rows=jnp.maximum(cu_q_lens[1:] - 1, 0),
        final_lens=(queue.lengths[queue.prompt] + queue.limits).at[sequence].get(mode="clip"),
        shared=shared_prefixes(table.table, cu_q_lens, kv_lens, state.pages.page_size) if shares else None,
    )
    counters = state.counters
    kind = "decode_steps" if max_q_len == 1 else "mixed_steps"
    lost = jnp.sum(preempted, dtype=jnp.int32)
    counters = replace(counters, preemptions=counters.preemptions + lost, **{kind: getattr(counters, kind) + 1})
    return State(state.pages, table, slots, state.outputs, counters), batch


def _tokens_at(queue: Queue, outputs: Outputs, sequence: jax.Array, position: jax.Array) -> jax.Array:
    """The token of each sequence at a position: of its prompt, or of what it generated."""
    prompt = queue.prompt.at[sequence].get(mode="clip")
    generated = position - queue.lengths[prompt]
    prompt_token = queue.tokens.at[queue.offsets[prompt] + position].get(mode="clip")
    new_token = outputs.tokens.at[sequence, generated].get(mode="clip")
    return jnp.where(generated < 0, prompt_token, new_token)


def advance(
    queue: Queue, state: State, batch: RaggedBatch, pages: KVPages, token, logprob, sampling_logprob=None
) -> State:
    """Take in what a forward pass gave: append tokens, end sequences, give their pages back.

    Args:
      queue: the requests.
      state: as planned.
      batch: what was computed.
      pages: the pool as the forward pass left it.
      token: `int32[S]`, the token sampled from each slot's last row; used only where that row was its last known token.
      logprob: `float32[S]`, its log-probability under the model.
      sampling_logprob: `float32[S]`, under the distribution sampled from, if the outputs keep that.

    Returns:
      The state for the next step.
    """
    num_sequences = queue.prompt.shape[0]
    slots, outputs = state.slots, state.outputs
    q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    sampled = (q_lens > 0) & (pending_tokens(queue, state) == q_lens)
    sequence = jnp.where(sampled, slots.sequence, num_sequences)
    generated = outputs.lengths.at[sequence].get(mode="fill", fill_value=0)
    stop_ids = queue.stop_ids[queue.prompt.at[sequence].get(mode="clip")]
    stopped = jnp.any(token[:, None] == stop_ids, axis=1)
    full = generated + 1 >= queue.limits.at[sequence].get(mode="fill", fill_value=NEVER)
    finish = jnp.where(stopped, Finish.STOP, jnp.where(full, Finish.LENGTH, Finish.RUNNING)).astype(jnp.int32)
    done = sampled & (finish != Finish.RUNNING)

    def append(kept, new):
        return kept.at[sequence, generated].set(new.astype(kept.dtype), mode="drop")

    used = outputs.sampling_logprobs
    return State(
        pages=pages,
        table=state.table.release(done),
        slots=Slots(sequence=jnp.where(done, -1, slots.sequence), context=jnp.where(done, 0, slots.context + q_lens)),
        outputs=Outputs(
            tokens=append(outputs.tokens, token),
            logprobs=append(outputs.logprobs, logprob),
            sampling_logprobs=None if used is None else append(used, sampling_logprob),
            lengths=outputs.lengths.at[sequence].add(1, mode="drop"),
            finish=outputs.finish.at[sequence].set(finish, mode="drop"),
        ),
        counters=state.counters,
    )
