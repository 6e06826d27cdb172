"""The mixture of experts against a loop over tokens in float64, in both of its forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import ModelConfig
from dsjax.layers import moe as module
from dsjax.layers.moe import moe
from dsjax.quantization import SCHEMES, QuantizedArray
from pallas_kernels.targets import compile_for, large_copies, memory

CONFIG = ModelConfig(
    model_type="mixtral",
    vocab_size=9,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_context=64,
    num_experts=8,
    experts_per_token=2,
)
FORMS = {"grouped": module._grouped, "every": module._every_expert}


@pytest.fixture(params=sorted(FORMS))
def form(request, monkeypatch):
    """The form that runs: on a CPU it would always be the first."""
    monkeypatch.setattr(module, "_grouped", FORMS[request.param])


def weights_of(config, rng, fused=True):
    e, f, d = config.num_experts, config.intermediate_size, config.hidden_size
    gate, up, down = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((e, f, d), (e, f, d), (e, d, f)))
    first = {"gate_up": np.concatenate([gate, up], axis=1)} if fused else {"gate": gate, "up": up}
    experts = {name: {"weight": jnp.asarray(leaf)} for name, leaf in (first | {"down": down}).items()}
    return {"router": {"weight": jnp.asarray(rng.normal(size=(e, d)), jnp.float32)}, "experts": experts}


def expected(x, weights, config):
    """A token at a time, an expert at a time; also which experts each token chose."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    experts = {name: leaf["weight"] for name, leaf in wide["experts"].items()}
    gate_up = experts.get("gate_up")
    gate, up = np.split(gate_up, 2, axis=1) if gate_up is not None else (experts["gate"], experts["up"])
    out, chosen = np.zeros(x.shape), []
    for i, token in enumerate(np.asarray(x, np.float64)):
        logits = wide["router"]["weight"] @ token
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probabilities)[: config.experts_per_token]
        chosen.append(best)
        total = probabilities[best].sum() if config.renormalize_experts else 1
        for e in best:
            pre = gate[e] @ token
            hidden = pre / (1 + np.exp(-pre)) * (up[e] @ token)
            out[i] += probabilities[e] / total * (experts["down"][e] @ hidden)
    return out, np.stack(chosen)


def run(x, weights, config):
    # A new function each time: what was traced for one form is not taken for the other.
    return jax.jit(lambda x, weights: moe(x, weights, config))(x, weights)


@pytest.mark.parametrize(
    ("tokens", "changes", "fused"),
    [
        (37, {}, True),
        (1, {"num_experts": 5, "experts_per_token": 3, "renormalize_experts": False}, False),
        (64, {"num_experts": 3, "experts_per_token": 1, "renormalize_experts": False}, True),
        (90, {"num_experts": 4, "experts_per_token": 4}, False),
    ],
)
@pytest.mark.usefixtures("form")
def test_equals_the_loop(tokens, changes, fused, rng):
    config = dataclasses.replace(CONFIG, **changes)
    weights, x = weights_of(config, rng, fused), rng.normal(size=(tokens, 32)).astype(np.float32)
    out = run(x, weights, config)
    np.testing.assert_allclose(out, expected(x, weights, config)[0], atol=1e-5)


@pytest.mark.usefixtures("form")
def test_no_token_depends_on_the_others(rng):
    """Not when all choose the same two experts, and not beside an infinite neighbour."""
    weights, x = weights_of(CONFIG, rng), rng.normal(size=(2, 40, 32)).astype(np.float32)
    router = np.zeros((8, 32), np.float32)
    router[6], router[3] = 2, 1
    weights["router"]["weight"] = jnp.asarray(router)
    x = np.abs(x)
    out = run(x, weights, CONFIG)
    reference, chosen = expected(x.reshape(-1, 32), weights, CONFIG)
    assert (chosen == [6, 3]).all() and out.shape == x.shape
    np.testing.assert_allclose(out.reshape(-1, 32), reference, atol=1e-5)
    x[1] = np.inf
    np.testing.assert_array_equal(run(x, weights, CONFIG)[0], out[0])


@pytest.mark.usefixtures("form")
def test_an_expert_that_overflows_where_it_is_not_chosen(rng):
    weights = weights_of(CONFIG, rng)
    x = np.abs(rng.normal(size=(16, 32))).astype(np.float32)
    router = np.zeros((8, 32), np.float32)
    router[5] = -1
    weights["router"]["weight"] = jnp.asarray(router)
    experts = weights["experts"]
    experts["down"]["weight"] = experts["down"]["weight"].at[5].set(np.inf)
    out = run(x, weights, CONFIG)
    np.testing.assert_allclose(out, expected(x, weights, CONFIG)[0], atol=1e-5)


def test_gradients_of_the_two_forms(rng):
    """The router's included, which `test_experts` compares to transformers for one of them."""
    weights, x = weights_of(CONFIG, rng), rng.normal(size=(37, 32)).astype(np.float32)
    out = {}
    for name, form in FORMS.items():

        def loss(x, weights, form=form):
            share, chosen = module.route(x, weights["router"]["weight"], CONFIG)
            return jnp.sum(jnp.sin(form(x, share, chosen, weights["experts"], config=CONFIG)))

        out[name] = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
    assert jnp.abs(out["every"][1]["router"]["weight"]).max() > 0.01
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), out["every"], out["grouped"])


@pytest.mark.usefixtures("form")
def test_quantized_experts_run_as_what_they_stand_for(rng):
    weights, x = weights_of(CONFIG, rng), rng.normal(size=(20, 32)).astype(np.float32)

    def quantized(shape):
        return QuantizedArray(
            values=jnp.asarray(rng.integers(-128, 128, shape), jnp.int8),
            scales=jnp.asarray(rng.uniform(0, 0.002, (*shape[:-1], shape[-1] // 32)), jnp.float16),
            minimums=None,
            scheme=SCHEMES["q8_0"],
            dtype=jnp.dtype("float32"),
        )

    packed = {name: {"weight": quantized(leaf["weight"].shape)} for name, leaf in weights["experts"].items()}
    plain = {name: {"weight": leaf["weight"].dequantize()} for name, leaf in packed.items()}
    out, reference = (run(x, weights | {"experts": experts}, CONFIG) for experts in (packed, plain))
    np.testing.assert_allclose(out, reference, atol=1e-5)


@pytest.mark.usefixtures("gpu_compiler")
def test_a_decode_step_reads_each_expert_once():
    """Mixtral-8x7B for an H200: no copy of experts' weights, and little memory."""
    config = dataclasses.replace(CONFIG, hidden_size=4096, intermediate_size=14336)
    shapes = {"gate_up": (8, 2 * 14336, 4096), "down": (8, 4096, 14336)}
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = {
        "router": {"weight": bf16((8, 4096))},
        "experts": {name: {"weight": bf16(shape)} for name, shape in shapes.items()},
    }
    compiled = compile_for(functools.partial(moe, config=config), bf16((32, 4096)), weights, target="h200")
    assert memory(compiled).temporaries < 32e6
    assert not large_copies(compiled, min_bytes=32_000_000)
    assert "while" not in compiled.as_text()
