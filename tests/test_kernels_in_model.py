"""The whole model on interpreted Triton kernels: generation equals that on plain XLA operations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config import Experts, Latent
from pallas_kernels.dispatch import UnsupportedError

PROMPTS = [[(7 * i) % 89 for i in range(35)], [9, 8, 7]]


def on_both(params, **options):
    return [
        dsjax.generate(params, PROMPTS, max_new_tokens=6, page_size=16, ignore_eos=True, implementation=name, **options)
        for name in ("xla", "triton")
    ]


def test_triton_generates_the_same(tiny_config):
    """Mixed and decode steps of a fused tree; samples share the pages of their prompt, which attention reads once."""
    config = dataclasses.replace(tiny_config, qk_norm="head", windows=(20, None))
    params = dsjax.prepare(dsjax.init(config, jax.random.key(0)))
    settings = {"temperature": 0.7, "top_k": 20, "key": jax.random.key(1)}
    expected, found = on_both(params, **settings, n=2)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert expected.counters.decode_steps > 0


LAYER_NORM = {"norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu_tanh", "mlp_bias": True}
FAMILIES = {
    "gemma2": {
        "norm_placement": "both",
        "norm_offset": 1.0,
        "embed_scale": 5.0,
        "attention_soft_cap": 5.0,
        "logit_soft_cap": 3.0,
        "windows": (9, None),
    },
    "olmo2, granite": {"norm_placement": "output", "qk_norm": "whole", "residual_multiplier": 0.5, "logit_scale": 0.2},
    "gpt_neox": LAYER_NORM | {"parallel_block": True, "rotary_dim": 8, "attention_bias": True},
    "gptj": LAYER_NORM | {"parallel_block": True, "shared_norm": True, "rotary_dim": 8, "rotary_interleaved": True},
    "bloom": LAYER_NORM | {"embed_norm": True, "rotary_dim": 0, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "gpt_oss": {
        "sinks": True,
        "windows": (9, None),
        "activation": "clamped_swiglu",
        "attention_out_bias": True,
        "experts": Experts(3, 2, 24, router_bias=True, bias=True),
    },
    "deepseek": {
        "head_dim": 24,
        "num_kv_heads": 4,
        "latent": Latent(kv_rank=24, query_rank=16, rope_size=8, nope_size=16, value_size=16),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_on_triton(family, tiny_config, rng):
    """A step that reads two prompts and one that decodes, from leaves that are all random: logits are those of XLA."""
    config = dataclasses.replace(tiny_config, **FAMILIES[family])
    shapes = dsjax.abstract(config)
    params = dsjax.prepare(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), shapes))
    steps = []
    for counts, lengths, tokens in (((13, 6), (13, 6), 20), ((1, 1), (14, 7), 2)):
        slot = np.repeat([0, 1, 2], [*counts, tokens - sum(counts)])
        start = np.array([*(n - q for n, q in zip(lengths, counts, strict=True)), 0])
        place = np.concatenate([np.arange(q) for q in (*counts, tokens - sum(counts))])
        integers = {
            "tokens": rng.integers(0, 97, tokens),
            "positions": start[slot] + place,
            "slot_of_token": slot,
            "cu_q_lens": np.array([0, counts[0], sum(counts)]),
            "kv_lens": np.array(lengths),
            "page_table": np.array([[3, 1], [0, 2]]),
            "logit_rows": np.array([counts[0] - 1, sum(counts) - 1]),
        }
        batch = dsjax.RaggedBatch(**{name: jnp.asarray(value, jnp.int32) for name, value in integers.items()})
        steps.append((batch, max(counts) if max(counts) == 1 else None))
    found = {}
    for name in ("xla", "triton"):
        pages = dsjax.KVPages.zeros(config, 4, 16, jnp.float32)
        found[name] = []
        for batch, max_q_len in steps:
            forward = jax.jit(functools.partial(dsjax.forward, max_q_len=max_q_len, implementation=name))
            logits, pages = forward(params, batch, pages)
            found[name].append(logits)
    assert jnp.std(found["xla"][0]) > 0.05
    for mine, theirs in zip(found["triton"], found["xla"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cuda", dsjax.RequestError, "implementation='cuda' is unknown; there are mosaic, triton, xla, reference"),
        ("mosaic", UnsupportedError, "ragged_paged_attention: implementation='mosaic' can not run: .*GPU"),
    ],
)
def test_a_kernel_that_can_not_run_says_why(name, error, message, tiny_params):
    with pytest.raises(error, match=message):
        dsjax.generate(tiny_params, PROMPTS, max_new_tokens=2, implementation=name)
