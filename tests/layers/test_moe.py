"""The mixture of experts against a loop over tokens in float64, in both of its forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Experts, ModelConfig
from dsjax.layers import moe as module
from dsjax.layers.moe import moe
from dsjax.quantization import SCHEMES, QuantizedArray
from pallas_kernels.targets import compile_for, entry_instructions, large_copies, memory

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
    experts=Experts(count=8, per_token=2, size=64),
)
FORMS = {"chosen": module._chosen_experts, "every": module._every_expert, "grouped": module._grouped}


@pytest.fixture(params=sorted(FORMS))
def form(request, monkeypatch):
    """The form that runs: on a CPU it would always be the first."""
    monkeypatch.setattr(module, "_grouped", FORMS[request.param])


def with_experts(**changes):
    return dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, **changes))


def weights_of(config, rng, fused=True):
    """Random leaves, all that the config has."""
    wanted = config.experts
    e, f, d = wanted.count, wanted.size, config.hidden_size

    def network(experts, size, bias, fused=False):
        shapes = {"gate": (*experts, size, d), "up": (*experts, size, d), "down": (*experts, d, size)}
        leaves = {name: {"weight": rng.normal(size=shape) / 8} for name, shape in shapes.items()}
        if bias:
            for name, shape in shapes.items():
                leaves[name]["bias"] = rng.normal(size=shape[:-1]) / 2
        if fused:
            kinds = leaves["gate"]
            pair = [(leaves["gate"][kind], leaves["up"][kind]) for kind in kinds]
            gate_up = {kind: np.concatenate(both, axis=1) for kind, both in zip(kinds, pair, strict=True)}
            leaves = {"gate_up": gate_up, "down": leaves["down"]}
        return leaves

    router = {"weight": rng.normal(size=(e, d)) / 4, "bias": rng.normal(size=e), "correction": rng.normal(size=e) / 4}
    unused = {"bias": not wanted.router_bias, "correction": not wanted.correction}
    module = {"router": {name: leaf for name, leaf in router.items() if not unused.get(name)}}
    module["experts"] = network((e,), f, wanted.bias, fused)
    if wanted.shared_size:
        module["shared"] = network((), wanted.shared_size, config.mlp_bias)
    if wanted.shared_mix != "sum":
        rows = {"gate": 1, "coefficient": 2}[wanted.shared_mix]
        module["shared_gate"] = {"weight": rng.normal(size=(rows, d)) / 4}
    if wanted.shared_mix == "coefficient":
        module["shared_gate"]["bias"] = rng.normal(size=2)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), module)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def chosen_by(logits, wanted, correction):
    """Numbers and weights of one token's experts."""
    if wanted.score == "sparsemixer":
        left, found = list(range(wanted.count)), []
        for _ in range(2):
            best = max(left, key=lambda e: logits[e])
            near = [
                e for e in left if (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * wanted.jitter
            ]
            found.append((best, softmax(logits[near])[near.index(best)]))
            left.remove(best)
        return [e for e, _ in found], np.array([weight for _, weight in found])
    scores = sigmoid(logits) if wanted.score == "sigmoid" else softmax(logits)
    preference = scores + correction
    size = wanted.count // wanted.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(wanted.groups)]
    summed = 1 if wanted.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted(preference[group])[-summed:]))
    allowed = sum(groups[: wanted.groups_per_token], [])
    best = sorted(allowed, key=lambda e: -preference[e])[: wanted.per_token]
    weights = scores[best] / (scores[best].sum() if wanted.renormalize else 1)
    return best, weights * wanted.scale


def network_of(x, leaves, config, expert=()):
    """A feed-forward network on one token, float64."""

    def linear(x, name):
        module = leaves[name]
        return module["weight"][expert] @ x + (module["bias"][expert] if "bias" in module else 0)

    if "gate_up" in leaves:
        gate, up = np.split(linear(x, "gate_up"), 2)
    else:
        gate, up = linear(x, "gate"), linear(x, "up")
    if config.activation == "clamped_swiglu":
        gate = np.minimum(gate, 7)
        return linear(gate * sigmoid(1.702 * gate) * (np.clip(up, -7, 7) + 1), "down")
    return linear(gate * sigmoid(gate) * up, "down")


def expected(x, weights, config):
    """A token at a time, an expert at a time; also which experts each token chose."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    router, wanted = wide["router"], config.experts
    out, chosen = np.zeros(x.shape), []
    for i, token in enumerate(np.asarray(x, np.float64)):
        logits = router["weight"] @ token + router.get("bias", 0)
        best, share = chosen_by(logits, wanted, router.get("correction", np.zeros(wanted.count)))
        chosen.append(best)
        for e, weight in zip(best, share, strict=True):
            out[i] += weight * network_of(token, wide["experts"], config, e)
        if wanted.shared_size:
            shared = network_of(token, wide["shared"], config)
            if wanted.shared_mix == "sum":
                out[i] += shared
                continue
            mix = wide["shared_gate"]["weight"] @ token + wide["shared_gate"].get("bias", 0)
            if wanted.shared_mix == "gate":
                out[i] += sigmoid(mix[0]) * shared
            else:
                out[i] = softmax(mix) @ [out[i], shared]
    return out, np.array(chosen)


def run(x, weights, config):
    # A new function each time: what was traced for one form is not taken for the other.
    return jax.jit(lambda x, weights: moe(x, weights, config))(x, weights)


@pytest.mark.parametrize(
    ("tokens", "changes", "fused"),
    [
        (37, {}, True),
        (1, {"count": 5, "per_token": 3, "renormalize": False}, False),
        (64, {"count": 3, "per_token": 1, "renormalize": False}, True),
        (90, {"count": 4, "per_token": 4}, False),
    ],
)
@pytest.mark.usefixtures("form")
def test_equals_the_loop(tokens, changes, fused, rng):
    config = with_experts(**changes)
    weights, x = weights_of(config, rng, fused), rng.normal(size=(tokens, 32)).astype(np.float32)
    out = run(x, weights, config)
    np.testing.assert_allclose(out, expected(x, weights, config)[0], atol=1e-5)


route = jax.jit(module.route, static_argnums=(2, 3))
GROUPS = {"count": 12, "per_token": 3, "groups": 4, "groups_per_token": 2}
ROUTINGS = {
    "sigmoid": {"score": "sigmoid"},
    "sigmoid-as-it-is": {"score": "sigmoid", "renormalize": False},
    "scale": {"scale": 2.5},
    "bias": {"router_bias": True},
    "correction": {"correction": True},
    "groups-by-best": GROUPS | {"renormalize": False},
    "groups-by-two-best": GROUPS | {"group_score": "top2"},
    "deepseek-v3": GROUPS | {"group_score": "top2", "score": "sigmoid", "correction": True, "scale": 2.5},
    "sparsemixer": {"score": "sparsemixer", "jitter": 0.3},
}


@pytest.mark.parametrize(
    ("name", "implementation"), [(name, "xla") for name in ROUTINGS] + [("bias", "triton"), ("deepseek-v3", "triton")]
)
def test_routing(name, implementation, rng):
    """Each way to choose experts, and that it is not what a softmax of the logits alone would choose."""
    config, plain = (
        with_experts(**{key: value for key, value in ROUTINGS[name].items() if key in kept})
        for kept in (ROUTINGS[name], ("count", "per_token"))
    )
    weights, x = weights_of(config, rng), jnp.asarray(rng.normal(size=(50, 32)), jnp.float32)
    share, chosen = route(x, weights["router"], config.experts, implementation)
    router = {kind: np.asarray(leaf, np.float64) for kind, leaf in weights["router"].items()}
    for logits, weight, best in zip(
        np.asarray(x, np.float64) @ router["weight"].T + router.get("bias", 0), share, chosen, strict=True
    ):
        right, values = chosen_by(logits, config.experts, router.get("correction", 0))
        assert best.tolist() == right
        np.testing.assert_allclose(weight, values, rtol=1e-4)
    other, others = route(x, weights["router"], plain.experts, "xla")
    assert (others != chosen).any() or jnp.abs(other - share).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"bias": True}, {}),
        ({"bias": True}, {"activation": "clamped_swiglu"}),
        ({"shared_size": 40}, {"mlp_bias": True}),
        ({"shared_size": 40, "shared_mix": "gate"}, {}),
        ({"shared_size": 40, "shared_mix": "coefficient", "per_token": 1, "renormalize": False}, {}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_biases_and_the_shared_network(changes, options, fused, rng):
    config = dataclasses.replace(with_experts(**changes), **options)
    weights, x = weights_of(config, rng, fused), 3 * rng.normal(size=(21, 32)).astype(np.float32)
    reference = expected(x, weights, config)[0]
    np.testing.assert_allclose(run(x, weights, config), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "options", "fused"),
    [
        ({"count": 5, "per_token": 3}, {}, True),
        ({"bias": True}, {"activation": "clamped_swiglu"}, False),
        ({"shared_size": 40, "shared_mix": "gate", "scale": 2.0}, {}, True),
    ],
)
def test_kernels(changes, options, fused, rng):
    """Outputs in parts, one for each expert of a token; with a shared network, their sum."""
    config = dataclasses.replace(with_experts(**changes), **options)
    weights, x = weights_of(config, rng, fused), 3 * rng.normal(size=(2, 5, 32)).astype(np.float32)
    out = jax.jit(functools.partial(moe, config=config, implementation="triton"))(x, weights)
    if "shared" not in weights:
        assert out.shape == (config.experts.per_token, *x.shape)
        out = out.sum(axis=0)
    reference = expected(x.reshape(-1, 32), weights, config)[0]
    np.testing.assert_allclose(out.reshape(-1, 32), reference, rtol=1e-4, atol=1e-4)


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
            share, chosen = module.route(x, weights["router"], CONFIG.experts)
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
    if module._grouped is not FORMS["grouped"]:
        return
    x, tiles = jnp.asarray(x, jnp.bfloat16), {name: {"weight": leaf["weight"].tiled()} for name, leaf in packed.items()}
    parts = jax.jit(functools.partial(moe, config=CONFIG, implementation="triton"))(x, weights | {"experts": tiles})
    assert parts.shape == (2, *x.shape) and parts.dtype == jnp.float32, "those of the kernels"
    reference = run(x.astype(jnp.float32), weights | {"experts": plain}, CONFIG)
    np.testing.assert_allclose(parts.sum(axis=0), reference, atol=0.02 * np.abs(reference).max())


@pytest.mark.usefixtures("gpu_compiler")
def test_a_decode_step_reads_each_expert_once():
    """Mixtral-8x7B for an H200: no copy of experts' weights, and little memory."""
    config = dataclasses.replace(with_experts(size=14336), hidden_size=4096)
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


def compiled_qwen3(tokens, implementation):
    """A layer of experts of Qwen3-30B-A3B for an H200."""
    config = dataclasses.replace(with_experts(count=128, per_token=8, size=768), hidden_size=2048)
    shapes = {"gate_up": (128, 2 * 768, 2048), "down": (128, 2048, 768)}
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = {
        "router": {"weight": bf16((128, 2048))},
        "experts": {name: {"weight": bf16(shape)} for name, shape in shapes.items()},
    }
    run = functools.partial(moe, config=config, implementation=implementation)
    return compile_for(run, bf16((tokens, 2048)), weights, target="h200")


@pytest.mark.usefixtures("gpu_compiler")
def test_one_token_reads_its_experts_alone():
    """8 of 128 experts a token, and not the others."""
    compiled = compiled_qwen3(1, "xla")
    one = 3 * 768 * 2048 * 2
    assert memory(compiled).temporaries < 9 * one
    assert "while" not in compiled.as_text()


@pytest.mark.usefixtures("gpu_compiler")
def test_launches_of_kernels():
    """The router, the choice, the plan and two products; next to no memory."""
    compiled = compiled_qwen3(32, None)
    launched = [each.opcode for each in entry_instructions(compiled)]
    assert set(launched) <= {"parameter", "bitcast", "get-tuple-element", "custom-call"}
    assert launched.count("custom-call") == 5
    assert memory(compiled).temporaries < 1e6
