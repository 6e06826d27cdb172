"""What the compiled step does with its memory: pages are updated in place, and nothing of their size is made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.generation import decode_steps, mixed_step, start
from dsjax.ragged.schedule import admit
from dsjax.request import request
from pallas_kernels.targets import compile_for, large_copies, memory

STEPS = {"mixed": mixed_step, "decode": decode_steps}


def abstract_step(config, kind, dtype):
    """A step over shapes only: the function and what it takes, the state last."""
    params = dsjax.abstract(config, dtype)
    prompts = np.full((8, 64), 1, np.int32)
    options = {"max_new_tokens": 64, "page_size": 64, "pages": 512, "slots": 8, "token_budget": 128}
    queue, capacity = request(params, prompts, **options)
    queue = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), queue)
    state = jax.eval_shape(lambda queue: admit(queue, start(params, queue, capacity)), queue)
    return lambda params, queue, state: STEPS[kind](params, queue, state, capacity), (params, queue, state)


def check_in_place(compiled, pages):
    buffer, pool = pages.keys[0], jax.tree.leaves(pages)
    buffer_bytes = buffer.size * buffer.dtype.itemsize
    assert memory(compiled).alias >= len(pool) * buffer_bytes, "every page buffer is aliased"
    assert memory(compiled).temporaries < buffer_bytes, "nothing as large as one buffer is made"
    assert large_copies(compiled, buffer_bytes) == []


@pytest.mark.parametrize("kind", STEPS)
def test_on_a_cpu(kind, tiny_config):
    step, arguments = abstract_step(tiny_config, kind, jnp.float32)
    compiled = jax.jit(step, donate_argnums=2).lower(*arguments).compile()
    check_in_place(compiled, arguments[2].pages)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("target", ["h200", "a100"])
def test_for_a_gpu(kind, target, gpu_compiler, tiny_config):
    config = dataclasses.replace(tiny_config, num_layers=4, hidden_size=256, head_dim=64)
    step, arguments = abstract_step(config, kind, jnp.bfloat16)
    check_in_place(compile_for(step, *arguments, target=target, donate_argnums=2), arguments[2].pages)


def test_a_lost_donation_is_seen(tiny_config):
    """The check can fail: without donation nothing is aliased."""
    step, arguments = abstract_step(tiny_config, "decode", jnp.float32)
    with pytest.raises(AssertionError, match="aliased"):
        check_in_place(jax.jit(step).lower(*arguments).compile(), arguments[2].pages)
