"""From what a caller asks for to what the scheduler runs on: the queue, and the sizes of the program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import RequestError
from dsjax.inputs import as_batch, is_traced, numpy_of, per_request, request_keys, stop_table
from dsjax.params import Params, validate
from dsjax.ragged.groups import PageGroups, page_groups, pages_for
from dsjax.ragged.pages import pages_dtype
from dsjax.ragged.state import Queue, Sampling

MOST_SLOTS = 64  # unless the caller says otherwise
MOST_TOKENS_A_STEP = 512
IMPLEMENTATIONS = ("mosaic", "triton", "xla", "reference")


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The static sizes of a run: what a program is compiled for.

    Attributes:
      slots: sequences that run at once (S).
      pages: pages in the pool (P).
      pages_per_slot: pages that one sequence may fill, of each group of layers (M).
      page_size: tokens a page (p).
      groups: the layers that share pages.
      token_budget: tokens of a step that reads prompts (T); a step that only decodes has `slots`.
      max_new_tokens: room in the outputs.
      samples: sequences of each prompt (n).
      steps_per_sync: decode steps between two looks at the queue.
      kv_dtype: name of the dtype of the pages.
      with_distribution: keep log-probabilities of the distribution sampled from.
      implementation: backend of the kernels, `None` for the best.
    """

    slots: int
    pages: int
    pages_per_slot: int
    page_size: int
    groups: PageGroups
    token_budget: int
    max_new_tokens: int
    samples: int
    steps_per_sync: int
    kv_dtype: str
    with_distribution: bool = False
    implementation: str | None = None


def request(
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
) -> tuple[Queue, Capacity]:
    """Check a request and lay it out for the scheduler; the arguments are those of `generate`.

    Returns:
      The queue, and the sizes that the program is compiled for.
    """
    validate(params)
    config = params.config
    config.require_head()
    tokens, lengths = as_batch(tokens, lengths, config)
    batch, longest = tokens.shape
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n), ("page_size", page_size)):
        _check_size(name, value)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise RequestError(f"implementation={implementation!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}")
    limits = per_request("limits", max_new_tokens if limits is None else limits, batch, jnp.int32, 0, max_new_tokens)
    _check_context(lengths, limits, config)

    sequences = batch * n
    num_slots: int = min(sequences, MOST_SLOTS) if slots is None else _check_size("slots", slots)
    budget: int = max(num_slots, min(MOST_TOKENS_A_STEP, batch * longest)) if token_budget is None else token_budget
    if budget < num_slots:
        raise RequestError(f"token_budget={budget} must be at least slots={num_slots}, a token for each")
    # On a CPU a look at the queue costs nothing, and a step for slots that have ended costs a whole one.
    steps = 1 if jax.default_backend() == "cpu" else 16
    # The last token generated is never read again, so it needs no place in the pages.
    most = min(longest + max_new_tokens, config.max_context) - 1
    pages_per_slot = pages_for(most, page_size)
    groups = page_groups(config, most, page_size, budget)
    num_pages: int = num_slots * groups.peak(pages_per_slot) if pages is None else pages
    known = not (is_traced(lengths) or is_traced(limits))
    needed = groups.peak(pages_for(int(np.max(lengths + limits)) - 1 if known else most, page_size))
    if num_pages < needed:
        raise RequestError(
            f"pages={num_pages} can never hold the longest request: it needs {needed} pages of {page_size} tokens"
        )
    capacity = Capacity(
        slots=num_slots,
        pages=num_pages,
        pages_per_slot=pages_per_slot,
        page_size=page_size,
        groups=groups,
        token_budget=budget,
        max_new_tokens=max_new_tokens,
        samples=n,
        steps_per_sync=steps if steps_per_sync is None else _check_size("steps_per_sync", steps_per_sync),
        kv_dtype=pages_dtype(kv_dtype, params),
        with_distribution=return_sampling_logprobs,
        implementation=implementation or _several_devices(params),
    )

    if logit_bias is not None:
        if np.shape(logit_bias) not in ((config.vocab_size,), (batch, config.vocab_size)):
            raise RequestError(f"logit_bias must be [V] or [B, V] with V={config.vocab_size}")
        logit_bias = jnp.broadcast_to(jnp.asarray(logit_bias, jnp.float32), (batch, config.vocab_size))
    setting = functools.partial(per_request, batch=batch)
    sequence: Any = np.arange(sequences, dtype=np.int32)
    prompt = sequence // n
    left = config.max_context - lengths
    queue = Queue(
        tokens=tokens.reshape(-1),
        offsets=np.arange(batch, dtype=np.int32) * longest,
        lengths=lengths,
        keys=request_keys(key, batch, needed=is_traced(temperature) or bool(np.any(np.asarray(temperature) > 0))),
        sampling=Sampling(
            temperature=setting("temperature", temperature, dtype=jnp.float32, low=0),
            top_k=setting("top_k", top_k, dtype=jnp.int32, low=0),
            top_p=setting("top_p", top_p, dtype=jnp.float32, low=0, high=1),
            min_p=setting("min_p", min_p, dtype=jnp.float32, low=0, high=1),
            repetition_penalty=setting("repetition_penalty", repetition_penalty, dtype=jnp.float32, low=1e-6),
            logit_bias=logit_bias,
        ),
        stop_ids=stop_table(stop_ids, ignore_eos, batch, config),
        prompt=prompt,
        sample=sequence % n,
        limits=numpy_of(limits, left).minimum(limits, left)[prompt],
        order=sequence,
    )
    return queue, capacity


def _several_devices(params: Params) -> str | None:
    """`"xla"` for parameters spread over a mesh: the compiler can not partition kernels as it does plain operations."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    return "xla" if any(len(leaf.sharding.device_set) > 1 for leaf in leaves) else None


def _check_size(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _check_context(lengths: Any, limits: Any, config: ModelConfig) -> None:
    """Refuse what is known to outgrow the model; what is traced ends at the model's context instead."""
    if is_traced(lengths) or is_traced(limits):
        return
    for index, (prompt, new) in enumerate(zip(lengths, limits, strict=True)):
        if prompt + new > config.max_context:
            raise RequestError(
                f"prompt {index} has {prompt} tokens and may get {new} more; the model's context is "
                f"{config.max_context}: shorten the prompt or lower max_new_tokens"
            )
