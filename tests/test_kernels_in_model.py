"""The whole model on interpreted Triton kernels: generation equals that on plain XLA operations."""

import dataclasses

import jax
import numpy as np
import pytest

import dsjax
from pallas_kernels.dispatch import UnsupportedError

PROMPTS = [[(7 * i) % 89 for i in range(35)], [9, 8, 7]]


def on_both(params, **options):
    return [
        dsjax.generate(params, PROMPTS, max_new_tokens=6, page_size=16, ignore_eos=True, implementation=name, **options)
        for name in ("xla", "triton")
    ]


@pytest.mark.parametrize("features", [{}, {"qk_norm": "head", "windows": (20, None)}], ids=["plain", "norms, window"])
def test_triton_generates_what_xla_does(features, tiny_config):
    """Mixed and decode steps of a fused tree; samples share the pages of their prompt, which attention reads once."""
    config = dataclasses.replace(tiny_config, **features)
    params = dsjax.prepare(dsjax.init(config, jax.random.key(0)))
    settings = {"temperature": 0.7, "top_k": 20, "key": jax.random.key(1)}
    expected, found = on_both(params, **settings, n=2 if features else 3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert expected.counters.decode_steps > 0


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
