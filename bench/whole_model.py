"""Whole models of random weights on this GPU: the decode step, its CUDA graphs, and generation beside transformers.

A decode step is timed as kernels are (`bench.timing`), at a context that is already there: pages hold random numbers.
It comes as one program a step, as a loop of 16 steps in a program, as the same loop with loops allowed in CUDA graphs
(which XLA leaves off by default), and with plain XLA in place of our kernels. The roofline is the bytes of the weights
and of the visible keys and values over the bandwidth of a large copy.

Generation is whole calls from token ids to token ids, of `generate` and of the engine, in turns with `transformers`,
after one call of each to compile.
"""

import dataclasses
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import dsjax
from bench.compiled import needed_weights
from bench.dumps import dumped
from bench.problems import random_array
from bench.shapes import SHAPES
from bench.timing import Contender, ceilings, failure, measure
from dsjax.config import ModelConfig
from dsjax.generation import decode_steps, start, step
from dsjax.ragged.groups import pages_for
from dsjax.ragged.schedule import admit
from dsjax.request import request
from pallas_kernels.dispatch import VARIABLE
from pallas_kernels.launches import read_schedule

ROOM = 512  # tokens that a slot may generate before its state is put back
LOOP = 16  # steps of a program with a loop
WITH_LOOPS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"

# Model, slots and context, or model, batch, prompt and new tokens.
DECODE = (
    ("llama-3.1-8b", 1, 1024),
    ("llama-3.1-8b", 32, 4096),
    ("smollm2-135m", 1, 1024),
    ("llama-3.2-1b", 1, 1024),
    ("smollm2-135m", 64, 1024),
    ("llama-3.2-1b", 64, 1024),
)
GENERATE = (
    ("llama-3.1-8b", 1, 128, 128),
    ("llama-3.1-8b", 32, 512, 128),
    ("llama-3.1-8b", 4, 4096, 1),
    ("smollm2-135m", 1, 128, 128),
    ("smollm2-135m", 64, 256, 256),
    ("llama-3.2-1b", 1, 1024, 128),
)
ROUNDS = 3


def config_of(model: str, tiny: bool) -> ModelConfig:
    """The model's config; in a rehearsal with every size tiny."""
    config = SHAPES[model]
    if not tiny:
        return config
    return dataclasses.replace(
        config,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )


@functools.lru_cache(1)
def weights(model: str, tiny: bool) -> dsjax.Params:
    """Random parameters in bfloat16, fused."""
    return dsjax.prepare(dsjax.init(config_of(model, tiny), jax.random.key(0), jnp.bfloat16))


def _tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, config.vocab_size, (batch, length)).astype(np.int32)


class Decoding:
    """Slots that all decode, at a given context, and the contenders that step them."""

    def __init__(self, params: dsjax.Params, slots: int, context: int, room: int):
        self.params, self.room = params, room
        tokens = _tokens(params.config, slots, context)
        queue, self.capacity = request(params, tokens, max_new_tokens=room, slots=slots, ignore_eos=True)
        self.queue = jax.device_put(queue)
        state = jax.jit(lambda queue: admit(queue, start(params, queue, self.capacity)))(self.queue)
        full = dataclasses.replace(state.slots, context=jnp.full(slots, context - 1, jnp.int32))
        state = dataclasses.replace(state, slots=full)
        pages = jax.tree.map(lambda leaf: random_array(0, leaf.shape, leaf.dtype), state.pages)
        self.saved = dataclasses.replace(state, pages=None)
        self.state = dataclasses.replace(state, pages=pages)

    def reset(self) -> None:
        """Back to the context where it began; what the pages hold after it does not matter."""
        fresh = jax.tree.map(jnp.copy, self.saved)
        self.state = jax.block_until_ready(dataclasses.replace(fresh, pages=self.state.pages))

    def lowered(self, steps: int) -> jax.stages.Lowered:
        """The program of so many steps."""
        capacity = dataclasses.replace(self.capacity, steps_per_sync=steps)

        def one(params, queue, state):
            return step(params, queue, state, capacity.slots, max_q_len=1)[0]

        def many(params, queue, state):
            return decode_steps(params, queue, state, capacity)

        return jax.jit(one if steps == 1 else many, donate_argnums=2).lower(self.params, self.queue, self.state)

    def contender(self, steps: int, **options: Any) -> Contender:
        compiled = self.lowered(steps).compile(compiler_options=options or None)

        def run():
            self.state = compiled(self.params, self.queue, self.state)
            return self.state.slots.context

        return Contender(run, jax.block_until_ready, steps, before=self.reset, most=max(1, self.room // steps))


def decode_step(model: str, slots: int, context: int, tiny: bool = False) -> dict[str, Any]:
    """Times the decode step of one model.

    Returns:
        For each way to run it the times and tokens a second; bytes and what fraction of the copy ceiling they come to;
        and what CUDA graphs the step has.
    """
    slots, context, room = (min(slots, 2), 20, 8) if tiny else (slots, context, ROOM)
    params, best = weights(model, tiny), ceilings(tiny)
    decoding = Decoding(params, slots, context, room)
    loop = 2 if tiny else LOOP
    ways: dict[str, Callable[[], Contender]] = {
        "step": lambda: decoding.contender(1),
        f"{loop} steps": lambda: decoding.contender(loop),
    }
    if not tiny:
        ways[f"{loop} steps, loops in graphs"] = lambda: decoding.contender(
            loop, xla_gpu_enable_command_buffer=WITH_LOOPS
        )
        ways["step, plain XLA"] = lambda: _with_plain_xla(decoding)
    made, found = {}, {}
    for name, make in ways.items():
        try:
            made[name] = make()
        except Exception as error:
            found[name] = failure(error)
    found |= measure(made, rounds=2 if tiny else 5, seconds=1e-4 if tiny else 0.05)

    room_of_slot = decoding.capacity.pages_per_slot * decoding.capacity.page_size
    pool = sum(leaf.nbytes for leaf in jax.tree.leaves(decoding.state.pages))
    nbytes = needed_weights(params, slots) + pool * context // room_of_slot
    for each in found.values():
        if "median" in each:
            rate = nbytes / each["median"]
            each |= {"tokens_per_s": slots / each["median"], "bytes_per_s": rate, "copy": rate / best["copy"]}
    return {"bytes": nbytes, "ways": found, "graphs": None if tiny else _graphs(decoding)}


def _with_plain_xla(decoding: Decoding) -> Contender:
    with mock.patch.dict(os.environ, {VARIABLE: "xla"}):
        return decoding.contender(1)


def _graphs(decoding: Decoding) -> dict[str, Any]:
    try:
        with dumped(decoding.lowered(1)) as (_, folder):
            schedule = read_schedule(folder)
    except Exception as error:
        return failure(error)
    return {
        "kernels": len(schedule.launches),
        "cuda_graphs": schedule.cuda_graphs,
        "outside_graphs": schedule.outside_graphs[:20],
    }


def generation(model: str, batch: int, length: int, new: int, tiny: bool = False) -> dict[str, Any]:
    """Times whole calls of `generate`, ours and those of transformers, in turns.

    Returns:
        For each the seconds of every call and the tokens a second of the median one, or why it did not run.

    """
    batch, length, new = (2, 8, min(new, 3)) if tiny else (batch, length, new)
    config = config_of(model, tiny)
    tokens = _tokens(config, batch, length)
    params = weights(model, tiny)

    def ours() -> int:
        return dsjax.generate(params, tokens, max_new_tokens=new, ignore_eos=True).tokens[:, 0].size

    found: dict[str, Any] = {}
    engine = dsjax.Engine(
        params,
        slots=batch,
        max_context=length + new,
        pages=batch * pages_for(length + new, 64),
        prefix_caching=False,  # the same prompts come again
    )
    settings = dsjax.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)

    def through_engine() -> int:
        return sum(len(output.outputs[0].token_ids) for output in engine.generate(tokens.tolist(), settings))

    made: dict[str, Callable[[], int]] = {"dsjax": ours, "dsjax.Engine": through_engine}
    try:
        made |= _transformers(config, tokens, new)
    except Exception as error:
        found["transformers"] = failure(error)
    seconds: dict[str, list[float]] = {}
    for name, run in made.items():
        try:
            if run() != batch * new:
                raise ValueError(f"it did not generate {batch * new} tokens")
            seconds[name] = []
        except Exception as error:
            found[name] = failure(error)
    for _ in range(ROUNDS):
        for name in seconds:
            begin = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        median = statistics.median(values)
        amount = batch * (new if new > 1 else length)
        found[name] = {"seconds": values, "median": median, "tokens_per_s": amount / median}
    made.clear()
    gc.collect()
    return {"ways": found}


def _transformers(config: ModelConfig, tokens: np.ndarray, new: int) -> dict[str, Callable[[], int]]:
    """`generate`, and `generate_batch`, which batches continuously over paged memory."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    transformers.logging.set_verbosity_error()
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(before)
    ids = torch.tensor(tokens, device=device).long()
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize()

    def generate() -> int:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, **options)
        finish()
        return out[:, tokens.shape[1] :].numel()

    def generate_batch() -> int:
        settings = transformers.GenerationConfig(**options, eos_token_id=-1)
        with torch.inference_mode():
            done = model.generate_batch(inputs=tokens.tolist(), generation_config=settings, progress_bar=False)
        finish()
        return sum(len(each.generated_tokens) for each in done.values())

    found: dict[str, Callable[[], int]] = {"transformers generate": generate}
    return found | {"transformers generate_batch": generate_batch} if cuda else found


def _units() -> dict[str, Callable[..., dict[str, Any]]]:
    found: dict[str, Callable[..., dict[str, Any]]] = {}
    for model in dict.fromkeys(model for model, *_ in DECODE):  # units of a model together: it is made once
        for name, slots, context in DECODE:
            if name == model:
                found[f"decode {name}, {slots} x {context}"] = functools.partial(decode_step, name, slots, context)
        for name, *sizes in GENERATE:
            if name == model:
                title = "generate {}, batch {}, {} in, {} out".format(name, *sizes)
                found[title] = functools.partial(generation, name, *sizes)
    return found


def units(tiny: bool = False) -> list[str]:
    """Names of what is timed; in a rehearsal one of each kind."""
    names = list(_units())
    return [next(name for name in names if name.startswith(kind)) for kind in ("decode", "generate")] if tiny else names


def run_unit(name: str, tiny: bool = False) -> dict[str, Any]:
    """Times one of `units`."""
    return _units()[name](tiny=tiny)


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """A result in words."""
    shown = [name]
    for way, each in result["ways"].items():
        if "error" in each:
            shown.append(f"  {way:34} did not run: {each['error'].splitlines()[0][:120]}")
        else:
            part = f" ({each['copy']:.2f} of the copy ceiling)" if "copy" in each else ""
            shown.append(f"  {way:34}{each['median'] * 1e3:10.3f} ms {each['tokens_per_s']:12.1f} tokens/s{part}")
    if result.get("graphs"):
        shown.append(f"  {result['graphs']}")
    return shown
