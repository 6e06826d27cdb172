"""The memory plan of an engine: weights, what its programs need beside them, and pages in the rest.

The original allocates its workspace from what is free at the first call; here the plan is made from the compiled
programs, before anything runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from tqdm.auto import tqdm

from dsjax import memory
from dsjax.engine.compiled import Programs, programs_for
from dsjax.engine.programs import Sizes
from dsjax.errors import EngineError, RequestError
from dsjax.memory import readable
from dsjax.params import Params
from dsjax.ragged.groups import PageGroups, pages_for
from dsjax.watched import is_watched

WORTHWHILE = 1.02  # so many times the pages are worth compiling again


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What an engine takes of the memory of one device, in bytes.

    Not counted: Python, JAX and its programs themselves; what the programs of `put` and of `logits_processor` need
    beyond the others; and what an allocator loses between arrays. On a GPU that is what the rest of the memory is for.

    Attributes:
      memory: all there is.
      budget: what the engine may take.
      weights: the parameters.
      state: queue, tables and outputs.
      temporaries: the most that a program needs while it runs.
      page: one page, in all layers of a group.
      pages: pages in the pool.
      page_size: tokens a page.
      groups: the layers that share pages.
      max_context: most tokens of a sequence.
    """

    memory: int
    budget: int
    weights: int
    state: int
    temporaries: int
    page: int
    pages: int
    page_size: int
    groups: PageGroups
    max_context: int

    @property
    def total(self) -> int:
        """What the engine takes."""
        return self.weights + self.state + self.temporaries + self.pages * self.page

    @property
    def tokens(self) -> int:
        """Tokens that fit, in sequences of `max_context`; behind a window they take no pages."""
        columns = pages_for(self.max_context - 1, self.page_size)
        return self.pages * columns // self.groups.peak(columns) * self.page_size

    def summary(self) -> str:
        """The plan in a line."""
        short = f", too few for one sequence of {self.max_context:,}" if self.tokens < self.max_context - 1 else ""
        pool = f"{self.pages:,} pages ({self.tokens:,} tokens{short}, {readable(self.pages * self.page)})"
        return (
            f"{readable(self.weights)} weights + {readable(self.temporaries)} temporaries + "
            f"{readable(self.state)} state + {pool} = {readable(self.total)} of {readable(self.memory)}"
        )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, or of their shapes, on one of their devices."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan(
    params: Params,
    sizes: Sizes,
    pages: int | None,
    fraction: float | None,
    progress: bool | None,
    *,
    total: int | None = None,
    programs_of: Callable[[Params, Sizes], Programs] = programs_for,
) -> tuple[MemoryPlan, Programs]:
    """Decide how many pages there are, and compile for them.

    Args:
      params: parameters on their devices, or their shapes and shardings.
      sizes: of the engine, without pages.
      pages: how many, or `None` for as many as fit; on a CPU, unless a fraction is given, no more than all slots need.
      fraction: of the device's memory that the engine may take; `None` for 0.9.
      progress: show a bar while programs compile.
      total: bytes of the device's memory; `None` asks the device, and leaves what others hold of it.
      programs_of: gives the programs for parameters and sizes.

    Raises:
      EngineError: the model does not fit; says what is needed and what there is.
      RequestError: both are given, or one is out of range.
    """
    if pages is not None and fraction is not None:
        raise RequestError("give pages or memory_fraction, not both: each says how many pages there are")
    if fraction is not None and not 0 < fraction <= 1:
        raise RequestError(f"memory_fraction={fraction} must be above 0 and at most 1")
    if pages is not None and (isinstance(pages, bool) or not isinstance(pages, int) or pages < 1):
        raise RequestError(f"pages must be a whole number of at least 1, got {pages!r}")
    device = next(iter(jax.tree.leaves(params)[0].sharding.device_set))
    others = 0 if total is not None else max(0, memory.in_use(device) - device_bytes(params))
    there = memory.available(device)[1] if total is None else total
    share = memory.USABLE if fraction is None else fraction
    budget = there - others if pages is not None else min(there - others, int(there * share))
    on_cpu = device.platform == "cpu"
    most = (
        sizes.slots * sizes.groups.peak(sizes.pages_per_slot) if on_cpu and fraction is None else None
    )  # others use this memory too

    def described(pages: int, temporaries: int) -> MemoryPlan:
        shapes = Programs(params, dataclasses.replace(sizes, pages=pages))
        pool = device_bytes(shapes.state_shapes.pages)
        return MemoryPlan(
            memory=there,
            budget=budget,
            weights=device_bytes(params),
            state=device_bytes((shapes.queue_shapes, shapes.state_shapes)) - pool,
            temporaries=temporaries,
            page=pool // pages,
            pages=pages,
            page_size=sizes.page_size,
            groups=sizes.groups,
            max_context=sizes.max_context,
        )

    def chosen(temporaries: int) -> MemoryPlan:
        if pages is not None:
            return described(pages, temporaries)
        made = described(1, temporaries)
        for _ in range(2):  # tables grow with the pages: what they take with too many is enough with fewer
            fit = memory.pages_that_fit(budget, made.total - made.pages * made.page, made.page)
            made = described(max(1, fit if most is None else min(fit, most)), temporaries)
        return made

    guess = _guess(params, sizes)
    made = chosen(guess)
    if made.total - guess > budget:
        raise EngineError(_too_much(made, others, on_cpu))
    is_first = True
    while True:
        programs = programs_of(params, dataclasses.replace(sizes, pages=made.pages))
        _warm_up(programs, progress)
        better = chosen(programs.temporaries())
        if better.total > budget:
            raise EngineError(_too_much(better, others, on_cpu))
        # Programs are for a number of pages. They are compiled again for fewer, and once for many more.
        if made.pages <= better.pages and (not is_first or better.pages <= made.pages * WORTHWHILE):
            return described(made.pages, better.temporaries), programs
        made, is_first = better, False


def _too_much(made: MemoryPlan, others: int, on_cpu: bool) -> str:
    """Why a plan does not fit, and what can be done."""
    held = f", of which others hold {readable(others)}" if others else ""
    rest = made.budget - (made.total - made.weights)
    devices = f"at least {math.ceil(made.weights / rest) if rest > 0 else 2} times as many "
    remedies = [
        "use fewer pages" if made.pages > 1 else "",
        "raise memory_fraction" if made.pages == 1 and made.budget < made.total <= made.memory - others else "",
        "let JAX have more of the GPU (XLA_PYTHON_CLIENT_MEM_FRACTION)" if not on_cpu else "",
        "lower slots, token_budget or max_context",
        "quantize the weights",
        f"spread them over {devices}devices: mesh=",
    ]
    return (
        f"the model does not fit: {readable(made.weights)} weights + {readable(made.temporaries)} temporaries + "
        f"{readable(made.state)} state + {made.pages:,} page{'s' * (made.pages > 1)} of {readable(made.page)} = "
        f"{readable(made.total)}, and there is {readable(made.budget)}, {made.budget / made.memory:.0%} of "
        f"{readable(made.memory)}{held}; " + ", ".join(filter(None, remedies[:-1])) + f", or {remedies[-1]}"
    )


def _guess(params: Params, sizes: Sizes) -> int:
    """Temporaries before anything is compiled: arrays of logits and of texts, and the widest layer for each token."""
    config = params.config
    logits = 4 * sizes.slots * config.vocab_size * 4
    texts = 4 * sizes.slots * 2 * sizes.max_context * 4
    widest = max(config.intermediate_size, config.hidden_size, config.num_heads * config.head_dim)
    return logits + texts + 4 * sizes.token_budget * widest * 4


def _warm_up(programs: Programs, progress: bool | None) -> None:
    watched = is_watched() if progress is None else progress
    with tqdm(total=0, desc="compiling", unit="program", disable=not watched, delay=0 if progress else 2.0) as bar:
        programs.warm_up(bar)
