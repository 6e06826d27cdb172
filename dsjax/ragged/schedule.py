"""The scheduler: admission, Dynamic SplitFuse, growth, preemption and completion, as pure functions on the device.

Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671): running sequences get their one token first, and the rest of
the token budget is filled with pieces of waiting prompts, so that every pass has about the same size.

Sequences are served in their `order`. One is admitted when pages for all its known tokens are free, besides those that
the running ones still need for theirs and one more for each. It takes them as it is read and written. When none is left
the newest one gives all of its pages back and waits to be computed again: the oldest always goes on, so the queue
always advances.

With groups of layers (see `groups`) "a page" is one for each group, and those with a window give pages back again.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.groups import PageGroups, pages_for
from dsjax.ragged.page_table import NEVER, PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.prefix import Prefixes, of_group
from dsjax.ragged.state import FREE, Emitted, Finish, Outputs, Queue, Slots, State, known_tokens, slot_sequences
from pallas_kernels.ragged_paged_attention import shared_prefixes


def unfinished(state: State) -> jax.Array:
    """Whether any sequence still has to generate."""
    return jnp.any(state.outputs.finish == Finish.RUNNING)


def pending_tokens(queue: Queue, state: State) -> Int[Array, "S"]:
    """Known tokens of each slot whose keys are not written: 1 while it decodes, more while its prompt is read."""
    known = known_tokens(queue, state.outputs)
    sequence = slot_sequences(state.slots, known.shape[0])
    return known.at[sequence].get(mode="fill", fill_value=0) - jnp.where(
        state.slots.sequence < 0, 0, state.slots.context
    )


def has_prompts(queue: Queue, state: State) -> jax.Array:
    """Whether any slot has more than one token to compute."""
    return jnp.any(pending_tokens(queue, state) > 1)


def admit(queue: Queue, state: State, groups: PageGroups | None = None) -> State:
    """Move waiting sequences into free slots, as many as slots and pages allow, in order.

    The first sample of a prompt reads it. Others wait until it has, then share its full pages by reference, get a copy
    of the page that they will write to, and begin at the prompt's last token, whose logits they need. A sequence that
    came back from preemption is treated alike. With prefix caching a sequence also begins behind the pages that hold
    the beginning of its text, and waits while a running one writes the next of them.

    Args:
      queue: the requests.
      state: its pages and slots are given out.
      groups: how far layers look back, default as the pool was made for.
    """
    groups = groups or state.pages.groups
    num_slots, num_sequences = state.slots.sequence.shape[0], queue.prompt.shape[0]
    sequence = slot_sequences(state.slots, num_sequences)
    running = jnp.zeros(num_sequences, bool).at[sequence].set(True, mode="drop")
    waiting = ~running & (state.outputs.finish == Finish.RUNNING)
    page_size = state.pages.page_size
    copies = jnp.zeros(min(num_slots, num_sequences) * groups.count, jnp.int32)

    # Most calls find nobody waiting, or no slot free.
    table, slots, prefixes, copied = lax.cond(
        jnp.any(waiting) & jnp.any(state.slots.sequence == FREE),
        lambda state: _choose(queue, state, waiting, groups, page_size),
        lambda state: (state.table, state.slots, state.prefixes, (copies, copies, jnp.zeros((), jnp.int32))),
        replace(state, pages=None),
    )
    return replace(state, pages=state.pages.copy(*copied), table=table, slots=slots, prefixes=prefixes)


def _choose(queue: Queue, state: State, waiting: jax.Array, groups: PageGroups, page_size: int):
    """Which of the waiting sequences go where.

    Returns:
      Page table, slots and keys with those in, and the pages to copy: sources, targets, how many.
    """
    table, slots, outputs = state.table, state.slots, state.outputs
    num_slots, columns, total_pages = table.table.shape[0], table.columns, table.ref_counts.shape[0]
    num_prompts, num_sequences = queue.lengths.shape[0], queue.prompt.shape[0]
    slot_ids, column = jnp.arange(num_slots), jnp.arange(columns)

    # For each prompt: a slot that has read it (the donor), whether one reads it, and its first waiting sequence.
    sequence = slot_sequences(slots, num_sequences)
    slot_prompt = queue.prompt.at[sequence].get(mode="fill", fill_value=num_prompts)
    length = queue.lengths.at[slot_prompt].get(mode="fill", fill_value=NEVER)
    has_read = slots.context >= length - 1
    gives = has_read
    for window in groups.windows:
        if window is not None:  # the first page that the prompt's last token sees must not have been given back
            first_seen = jnp.maximum(length - window, 0) // page_size
            gives &= (first_seen + 1) * page_size > slots.context - window + 1
    donor_of_prompt = jnp.full(num_prompts, -1).at[slot_prompt].max(jnp.where(gives, slot_ids, -1), mode="drop")
    is_read = jnp.zeros(num_prompts, bool).at[slot_prompt].max(~has_read, mode="drop")
    first = jnp.full(num_prompts, NEVER).at[queue.prompt].min(jnp.where(waiting, queue.order, NEVER))
    has_donor = donor_of_prompt[queue.prompt] >= 0
    leads = ~is_read[queue.prompt] & (queue.order == first[queue.prompt])
    eligible = waiting & (has_donor | leads)

    # Candidates in order, one for each free slot.
    count = min(num_slots, num_sequences)
    candidate = jnp.argsort(jnp.where(eligible, queue.order, NEVER))[:count]
    prompt_len = queue.lengths[queue.prompt[candidate]]
    known = known_tokens(queue, outputs)
    donor = donor_of_prompt[queue.prompt[candidate]]
    forks = donor >= 0
    donor_row = table.table[jnp.maximum(donor, 0)]
    shared = jnp.where(forks, (prompt_len - 1) // page_size, 0)
    shared_row = jnp.where(jnp.tile(column, groups.count) < shared[:, None], donor_row, total_pages)
    wants = eligible[candidate]
    prefixes = state.prefixes
    if prefixes is not None:
        found, found_row = _find(prefixes, table, candidate, known, groups, page_size)
        found = jnp.where(forks, 0, found)
        shared = jnp.where(forks, shared, found)
        shared_row = jnp.where(forks[:, None], shared_row, found_row)
        # Who runs, or comes before, and will write the page that is to be found next.
        others = jnp.concatenate([sequence, jnp.where(wants, candidate, num_sequences)])
        theirs = prefixes.of_text.at[others[None, :], found[:, None]].get(mode="fill", fill_value=0)
        same = jnp.all(theirs == prefixes.of_text[candidate, jnp.minimum(found, columns - 1)][:, None], axis=-1)
        ends = (found + 1) * page_size
        same &= known.at[others].get(mode="fill", fill_value=0) >= ends[:, None]
        will_write = jnp.concatenate(
            [slots.context < ends[:, None], jnp.arange(count) < jnp.arange(count)[:, None]], axis=1
        )
        wants &= forks | (ends > known[candidate] - 1) | ~jnp.any(same & will_write, axis=1)
    # Pages that are found free are taken from the free ones too.
    revived = jnp.sum(table.ref_counts.at[shared_row].get(mode="fill", fill_value=1) == 0, axis=1)
    needed = groups.peak(pages_for(known[candidate], page_size) - shared) + revived
    waits = slots.sequence < 0
    running_known = known.at[sequence].get(mode="fill", fill_value=0)
    promised = groups.peak(jnp.where(waits, 0, jnp.maximum(pages_for(running_known, page_size) - table.num_pages, 0)))
    place = jnp.cumsum(wants) - 1
    free_slot = jnp.nonzero(slots.sequence == FREE, size=count, fill_value=num_slots)[0][place]
    company = (jnp.sum(~waits) + place) * groups.count
    fits = jnp.cumsum(jnp.where(wants, needed, 0)) + jnp.sum(promised) + company <= table.num_free
    admitted = wants & jnp.cumprod(~wants | (fits & (free_slot < num_slots))).astype(bool)

    # The page that a fork will write to begins with prompt tokens of the donor's, unless it begins at the last token.
    copies = admitted & forks & ((prompt_len - 1) % page_size > 0)
    shared_row = jnp.where(admitted[:, None], shared_row, total_pages)
    taken = replace(table, ref_counts=table.ref_counts.at[shared_row].add(1, mode="drop"))
    index = (jnp.cumsum(copies) - 1)[:, None] * groups.count + jnp.arange(groups.count)
    fresh = taken.free_list(min(count * groups.count, total_pages)).at[jnp.where(copies[:, None], index, total_pages)]
    target_page = fresh.get(mode="fill", fill_value=total_pages)
    at = jnp.minimum((prompt_len - 1) // page_size, columns - 1)[:, None] + jnp.arange(groups.count) * columns
    source_page = jnp.take_along_axis(donor_row, at, axis=1)
    is_new = jnp.zeros(shared_row.shape, bool).at[jnp.arange(count)[:, None], at].set(copies[:, None])
    rows = shared_row.at[jnp.arange(count)[:, None], jnp.where(copies[:, None], at, table.table.shape[1])].set(
        target_page, mode="drop"
    )
    target = jnp.where(admitted, free_slot, num_slots)
    copied_first = jnp.argsort(~copies)
    if prefixes is not None:
        looked = admitted & ~forks
        first_time = jnp.where(looked & (known[candidate] == prompt_len), candidate, num_sequences)
        prefixes = replace(
            prefixes,
            cached=prefixes.cached.at[first_time].set(found * page_size, mode="drop"),
            found=prefixes.found + jnp.sum(jnp.where(looked, found * page_size, 0), dtype=jnp.int32),
            asked=prefixes.asked + jnp.sum(jnp.where(looked, known[candidate], 0), dtype=jnp.int32),
        )
    begin = jnp.where(forks, prompt_len - 1, shared * page_size)
    slots = Slots(
        sequence=slots.sequence.at[target].set(candidate.astype(jnp.int32), mode="drop"),
        context=slots.context.at[target].set(begin, mode="drop"),
    )
    table = table.assign(target, rows, shared + copies, is_new)
    sources, targets = (page[copied_first].reshape(-1) for page in (source_page, target_page))
    return table, slots, prefixes, (sources, targets, jnp.sum(copies, dtype=jnp.int32) * groups.count)


def _find(prefixes: Prefixes, table: PageTable, candidate, known, groups: PageGroups, page_size: int):
    """Pages that hold the beginnings of texts.

    The last known token is always computed, since its logits are wanted. Behind a window only the pages that can still
    be seen have to be there.

    Returns:
      `int32[C]`, how many pages each may skip, and `int32[C, G * M]`, those among them to be read, else `P`.
    """
    columns, total = table.columns, table.ref_counts.shape[0]
    column = jnp.arange(columns)
    assert table.contents is not None
    known_pages = column < ((known[candidate] - 1) // page_size)[:, None]
    pages, backs, enough = [], [], known_pages
    for group, window in enumerate(groups.windows):
        page = prefixes.lookup(table.contents, of_group(prefixes.of_text[candidate], group))
        present = (page < total) & known_pages
        run_begin = lax.cummax(jnp.where(present, 0, column + 1), axis=1)
        back = columns if window is None else pages_for(window - 1, page_size)
        enough &= present & (column + 1 - run_begin >= jnp.minimum(column + 1, back))
        pages.append(page)
        backs.append(back)
    found = jnp.max(jnp.where(enough, column + 1, 0), axis=1)
    rows = [
        jnp.where((column < found[:, None]) & (column >= found[:, None] - back), page, total)
        for page, back in zip(pages, backs, strict=True)
    ]
    return found.astype(jnp.int32), jnp.concatenate(rows, axis=1)


def _grow(state: State, q_lens: jax.Array, active: jax.Array, order: jax.Array, num_tokens: int):
    """Pages for the tokens of a step, oldest first; when they run out the newest slot is preempted.

    Args:
      state: its page table grows.
      q_lens: tokens of each slot.
      active: slots that run.
      order: of their sequences.
      num_tokens: of all slots, at most.

    Returns:
      The table, which slots are preempted (at most one), and which got nothing and must pause for this step.
    """
    table, page_size = state.table, state.pages.page_size
    count = jnp.maximum(pages_for(state.slots.context + q_lens, page_size) - table.num_pages, 0)
    count = jnp.where(active & (q_lens > 0), count, 0)
    short = jnp.sum(count) * table.groups > table.num_free
    newest = jnp.argmax(jnp.where(active, order, -1))
    preempted = short & (jnp.sum(active) > 1) & (jnp.arange(active.shape[0]) == newest)
    table = table.release(preempted)
    count = jnp.where(preempted, 0, count)
    in_line = count + jnp.sum(jnp.where(order < order[:, None], count, 0), axis=1)
    granted = in_line * table.groups <= table.num_free
    most = order.shape[0] + num_tokens // page_size
    return table.extend(jnp.where(granted, count, 0), most), preempted, (count > 0) & ~granted


def plan(
    queue: Queue,
    state: State,
    num_tokens: int,
    max_q_len: int | None = None,
    shares: bool = False,
    split_fuse: bool = True,
) -> tuple[State, RaggedBatch]:
    """Decide what the next forward pass computes.

    Args:
      queue: the requests.
      state: pages for the tokens planned are taken from it.
      num_tokens: tokens in the batch (T), at least the number of slots.
      max_q_len: most tokens a slot, 1 for a step that only decodes.
      shares: also find which slots begin with the same pages, for attention to read those once.
      split_fuse: cut prompts into pieces, and compute them together with what decodes. Without, whole prompts go first,
        alone; `num_tokens` must hold the longest.

    Returns:
      The state with pages granted and, if they ran out, the newest sequence preempted; and the batch.
    """
    num_slots = state.slots.sequence.shape[0]
    num_sequences = queue.prompt.shape[0]
    page_size = state.pages.page_size
    sequence = slot_sequences(state.slots, num_sequences)
    active = state.slots.sequence >= 0
    order = queue.order.at[sequence].get(mode="fill", fill_value=NEVER)
    pending = pending_tokens(queue, state)

    ready = jnp.where(active, pending, 0)
    decoding = ready == 1
    reading = jnp.where(decoding, 0, ready)
    if not split_fuse:
        decoding &= ~jnp.any(reading > 0)
    left = num_tokens - jnp.sum(decoding) - jnp.sum(jnp.where(order < order[:, None], reading, 0), axis=1)
    piece = jnp.clip(left, 0, reading) if split_fuse else jnp.where(left >= reading, reading, 0)
    q_lens = jnp.where(decoding, 1, piece)
    if max_q_len is not None:
        q_lens = jnp.minimum(q_lens, max_q_len)
    table, preempted, paused = _grow(state, q_lens, active, order, num_tokens)
    q_lens = jnp.where(preempted | paused, 0, q_lens)
    slots = Slots(
        sequence=jnp.where(preempted, FREE, state.slots.sequence), context=jnp.where(preempted, 0, state.slots.context)
    )

    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    row = jnp.arange(num_tokens)
    slot = jnp.searchsorted(cu_q_lens[1:], row, side="right", method="compare_all").astype(jnp.int32)
    is_real = slot < num_slots
    position = slots.context.at[slot].get(mode="clip") + row - cu_q_lens.at[slot].get(mode="clip")
    position = jnp.where(is_real, position, 0)
    kv_lens = jnp.where(q_lens > 0, slots.context + q_lens, 0)
    # Several samples of a prompt hold the same pages of it. So do prompts that prefix caching found alike; but there
    # may be none, and to look for them costs six launches a layer. What is alike in the first group is in all of them.
    shares &= num_sequences > queue.lengths.shape[0]
    batch = RaggedBatch(
        tokens=jnp.where(is_real, _tokens_at(queue, state.outputs, sequence.at[slot].get(mode="clip"), position), 0),
        positions=position,
        slot_of_token=slot,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        page_table=table.table,
        logit_rows=jnp.maximum(cu_q_lens[1:] - 1, 0),
        final_lens=(queue.lengths[queue.prompt] + queue.limits).at[sequence].get(mode="clip"),
        shared=shared_prefixes(table.table[:, : table.columns], cu_q_lens, kv_lens, page_size) if shares else None,
    )
    counters = state.counters
    kind = "decode_steps" if max_q_len == 1 else "mixed_steps"
    lost = jnp.sum(preempted, dtype=jnp.int32)
    counters = replace(
        counters,
        preemptions=counters.preemptions + lost,
        tokens=counters.tokens + cu_q_lens[-1],
        **{kind: getattr(counters, kind) + 1},
    )
    return replace(state, table=table, slots=slots, counters=counters), batch


def _tokens_at(queue: Queue, outputs: Outputs, sequence: jax.Array, position: jax.Array) -> jax.Array:
    """The token of each sequence at a position: of its prompt, or of what it generated."""
    prompt = queue.prompt.at[sequence].get(mode="clip")
    generated = position - queue.lengths[prompt]
    prompt_token = queue.tokens.at[queue.offsets[prompt] + position].get(mode="clip")
    new_token = outputs.tokens.at[sequence, generated].get(mode="clip")
    return jnp.where(generated < 0, prompt_token, new_token)


def advance(
    queue: Queue,
    state: State,
    batch: RaggedBatch,
    pages: KVPages,
    token,
    logprob,
    sampling_logprob=None,
    *,
    groups: PageGroups | None = None,
) -> tuple[State, Emitted]:
    """Take in what a forward pass gave: append tokens, end sequences, give their pages back.

    Args:
      queue: the requests.
      state: as planned.
      batch: what was computed.
      pages: the pool as the forward pass left it.
      token: `int32[S]`, the token sampled from each slot's last row; used only where that row was its last known token.
      logprob: `float32[S]`, its log-probability under the model.
      sampling_logprob: `float32[S]`, under the distribution sampled from, if the outputs keep that.
      groups: how far layers look back, default as the pool was made for; pages further back are given back.

    Returns:
      The state for the next step, and the tokens that were appended.
    """
    num_sequences = queue.prompt.shape[0]
    slots, outputs, table, prefixes = state.slots, state.outputs, state.table, state.prefixes
    page_size = pages.page_size
    q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    sampled = (q_lens > 0) & (pending_tokens(queue, state) == q_lens)
    sequence = jnp.where(sampled, slots.sequence, num_sequences)
    generated = outputs.lengths.at[sequence].get(mode="fill", fill_value=0)
    prompt = queue.prompt.at[sequence].get(mode="clip")
    stopped = jnp.any(token[:, None] == queue.stop_ids[prompt], axis=1)
    full = generated + 1 >= queue.limits.at[sequence].get(mode="fill", fill_value=NEVER)
    finish = jnp.where(stopped, Finish.STOP, jnp.where(full, Finish.LENGTH, Finish.RUNNING)).astype(jnp.int32)
    done = sampled & (finish != Finish.RUNNING)
    context = slots.context + q_lens

    if prefixes is not None and queue.salt is not None:
        table, prefixes = _remember(slots, table, prefixes, batch, page_size)
        position = queue.lengths[prompt] + generated
        prefixes = prefixes.append(sequence, position, token, queue.salt[prompt], page_size)
    table = give_back_unseen(table, context, slots.sequence >= 0, groups or pages.groups, page_size)

    def append(kept, new):
        return kept if kept is None else kept.at[sequence, generated].set(new.astype(kept.dtype), mode="drop")

    state = State(
        pages=pages,
        table=table.release(done),
        slots=Slots(sequence=jnp.where(done, FREE, slots.sequence), context=jnp.where(done, 0, context)),
        outputs=Outputs(
            tokens=append(outputs.tokens, token),
            logprobs=append(outputs.logprobs, logprob),
            sampling_logprobs=append(outputs.sampling_logprobs, sampling_logprob),
            lengths=outputs.lengths.at[sequence].add(1, mode="drop"),
            finish=outputs.finish.at[sequence].set(finish, mode="drop"),
        ),
        counters=state.counters,
        prefixes=prefixes,
    )
    return state, Emitted(sequence=sequence, token=token, logprob=logprob, finish=finish)


def give_back_unseen(table: PageTable, context, active, groups: PageGroups, page_size: int) -> PageTable:
    """Take the pages from slots that no query of theirs will see: the next one is at `context`."""
    if all(window is None for window in groups.windows):
        return table
    end = (jnp.arange(table.columns) + 1) * page_size
    unseen = [
        jnp.zeros((len(context), table.columns), bool) if window is None else end <= (context - window + 1)[:, None]
        for window in groups.windows
    ]
    return table.give_back(jnp.concatenate(unseen, axis=1) & active[:, None])


def _remember(slots: Slots, table: PageTable, prefixes: Prefixes, batch: RaggedBatch, page_size: int):
    """Note the texts of the pages that this batch filled."""
    total = table.ref_counts.shape[0]
    sequence = slot_sequences(slots, prefixes.of_text.shape[0])
    owner = sequence.at[batch.slot_of_token].get(mode="fill", fill_value=prefixes.of_text.shape[0])
    column = batch.positions // page_size
    fills = (batch.positions + 1) % page_size == 0
    keys = prefixes.of_text.at[owner, column].get(mode="fill", fill_value=0)
    for group in range(table.groups):
        page = batch.page_table.at[batch.slot_of_token, column + group * table.columns].get(
            mode="fill", fill_value=total
        )
        assert table.contents is not None
        prefixes, contents = prefixes.insert(table.contents, jnp.where(fills, page, total), of_group(keys, group))
        table = replace(table, contents=contents)
    return table, prefixes
