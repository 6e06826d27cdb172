"""Every backend of the product with experts' weights, and of its plan, against loops in float64 on the host."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.dispatch import Gpu, UnsupportedError
from pallas_kernels.grouped_matmul import grouped_matmul, plan_experts, shapes, triton
from pallas_kernels.grouped_matmul.api import BACKENDS
from pallas_kernels.grouped_matmul.plan import default_block_rows, most_blocks
from pallas_kernels.resources import kernel_resources
from pallas_kernels.targets import TARGETS, compile_for, entry_instructions


def choices(rng, tokens, per_token, experts):
    """Different experts for each token."""
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :per_token]


def blocks_of(chosen, experts, rows):
    """The order of pairs and the blocks in it, by loops."""
    flat = [e if 0 <= e < experts else experts for e in chosen.reshape(-1).tolist()]
    order, blocks = [], []
    for expert in range(experts + 1):
        pairs = [pair for pair, each in enumerate(flat) if each == expert]
        for first in range(0, len(pairs), rows):
            blocks.append((expert, len(order) + first, min(rows, len(pairs) - first)))
        order += pairs
    return order, blocks


plan_of = jax.jit(plan_experts, static_argnames=("num_experts", "block_rows", "implementation"))


def check_plan(chosen, experts, rows, implementation):
    plan = plan_of(jnp.asarray(chosen, jnp.int32), experts, block_rows=rows, implementation=implementation)
    order, blocks = blocks_of(chosen, experts, rows)
    assert plan.order.tolist() == order
    found = np.asarray(plan.blocks).T
    assert [tuple(each) for each in found[: len(blocks)].tolist()] == blocks
    assert found.shape[0] == most_blocks(chosen.size, experts, rows) and not found[len(blocks) :, 2].any()


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_plan(implementation, rng):
    """One shape, which is compiled once: a few rows each; all to one expert; to two; to some that are none; to none."""
    tokens, per_token, experts = 35, 2, 5
    for chosen in (
        choices(rng, tokens, per_token, experts),
        np.full((tokens, per_token), 3),
        rng.choice([0, 4], (tokens, per_token)),
        rng.integers(-3, experts + 3, (tokens, per_token)),
        np.full((tokens, per_token), -1),
    ):
        check_plan(chosen, experts, 16, implementation)


def test_plan_of_one_token_among_many_experts(rng):
    check_plan(choices(rng, 1, 8, 128), 128, 16, "triton")


@hypothesis.given(
    pairs=st.integers(1, 4000), experts=st.integers(1, 300), log_rows=st.integers(4, 8), seed=st.integers(0, 2**16)
)
def test_there_are_blocks_enough(pairs, experts, log_rows, seed):
    """However pairs are spread over the experts and none; and one block fewer would not be."""
    rng, rows = np.random.default_rng(seed), 2**log_rows
    most = most_blocks(pairs, experts, rows)
    sizes = rng.multinomial(pairs, rng.dirichlet(np.full(experts + 1, rng.choice([0.1, 1, 100]))))
    assert sum(-(-sizes // rows)) <= most
    worst = np.zeros(experts + 1, int)
    worst[: min(pairs, experts + 1)] = 1
    worst[0] += pairs - sum(worst)
    assert sum(-(-worst // rows)) == most


def float64_activation(name, gate, up):
    if name == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return {"silu": lambda: gate / (1 + np.exp(-gate)), "relu": lambda: np.maximum(gate, 0)}[name]() * up


def float64_expert(row, weight, bias, activation=None, gated=True):
    """One row through one expert."""
    out = np.asarray(weight, np.float64) @ np.asarray(row, np.float64)
    if bias is not None:
        out += np.asarray(bias, np.float64)
    if activation is None:
        return out
    return float64_activation(activation, *np.split(out, 2)) if gated else float64_activation(activation, out, 1.0)


def arrays_of(rng, tokens, experts, out, inner, dtype):
    """Rows, weights and biases."""
    x = jnp.asarray(rng.normal(size=(tokens, inner)), dtype)
    weight = jnp.asarray(rng.normal(size=(experts, out, inner)) * inner**-0.5, dtype)
    return x, weight, jnp.asarray(rng.normal(size=(experts, out)), dtype)


def near(out, exact, dtype):
    """Rounded once: to half of the last bit, and what float32 sums lose."""
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=2e-5)


# As in the original's test of this product, its sizes scaled down: one expert, and many with few rows each. No size is
# a multiple of a tile.
PRODUCTS = {
    "one expert": ((13, 1, 1), np.float32, {}),
    "many": ((16, 64, 1), jnp.float16, {"activation": "relu", "gated": False}),
    "more than a block": ((64, 8, 3), jnp.bfloat16, {"activation": "silu"}),
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("case", PRODUCTS)
def test_product_of_gathered_rows(implementation, case, rng):
    (tokens, experts, per_token), dtype, options = PRODUCTS[case]
    chosen = choices(rng, tokens, per_token, experts)
    x, weight, bias = arrays_of(rng, tokens, experts, 40, 72, dtype)
    biases = bias if options else None

    @jax.jit
    def run(x, weight, bias, chosen):
        plan = plan_experts(chosen, experts)
        return grouped_matmul(x, weight, plan, gather=True, bias=bias, implementation=implementation, **options)

    out = run(x, weight, biases, jnp.asarray(chosen, jnp.int32))
    order, _ = blocks_of(chosen, experts, 16)
    expert = chosen.reshape(-1)
    exact = [
        float64_expert(x[i // per_token], weight[expert[i]], bias[expert[i]] if options else None, **options)
        for i in order
    ]
    assert out.dtype == dtype
    near(out, np.array(exact), dtype)


@functools.partial(jax.jit, static_argnames=("activation", "implementation", "block_rows"))
def mixture(x, chosen, share, gate_up, down, activation, implementation, block_rows=None):
    (first, first_bias), (second, second_bias) = gate_up, down
    plan = plan_experts(chosen, first.shape[0], block_rows=block_rows, implementation="xla")
    run = functools.partial(grouped_matmul, plan=plan, implementation=implementation)
    hidden = run(x, first, gather=True, bias=first_bias, activation=activation)
    return run(hidden, second, scatter=True, bias=second_bias, scale=share, dtype=jnp.float32)


def mixture_arrays(rng, tokens, per_token, experts, inner, size, dtype=np.float32):
    chosen = choices(rng, tokens, per_token, experts)
    x, *gate_up = arrays_of(rng, tokens, experts, 2 * size, inner, dtype)
    _, *down = arrays_of(rng, 1, experts, inner, size, dtype)
    share = jnp.asarray(rng.random((tokens, per_token)), jnp.float32)
    return x, jnp.asarray(chosen, jnp.int32), share, gate_up, down


@pytest.mark.parametrize("implementation", BACKENDS)
def test_mixture(implementation, rng):
    """Both products, back in the order of tokens; a pair without an expert is 0."""
    x, chosen, share, gate_up, down = mixture_arrays(rng, 37, 3, 6, 48, 24)
    chosen = chosen.at[4, 1].set(-1).at[9].set(6)
    out = mixture(x, chosen, share, gate_up, down, "clamped_swiglu", implementation)
    assert out.shape == (3, 37, 48) and out.dtype == np.float32
    exact = np.zeros(out.shape)
    for t in range(37):
        for j, e in enumerate(chosen[t].tolist()):
            if 0 <= e < 6:
                hidden = float64_expert(x[t], gate_up[0][e], gate_up[1][e], "clamped_swiglu")
                exact[j, t] = float(share[t, j]) * float64_expert(hidden, down[0][e], down[1][e])
    near(out, exact, np.float32)
    assert not out[1, 4].any() and not out[:, 9].any()


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_no_token_depends_on_the_others(implementation, rng):
    """Not on how many there are, to the last bit; and not on one that is infinite."""
    arrays = mixture_arrays(rng, 24, 2, 3, 32, 16)
    out = mixture(*arrays, "silu", implementation, block_rows=32)
    alone = mixture(*(each[:3] for each in arrays[:3]), *arrays[3:], "silu", implementation, block_rows=32)
    np.testing.assert_array_equal(out[:, :3], alone)
    spoilt = mixture(arrays[0].at[7].set(np.inf), *arrays[1:], "silu", implementation, block_rows=32)
    np.testing.assert_array_equal(np.delete(spoilt, 7, axis=1), np.delete(out, 7, axis=1))
    assert not np.isfinite(spoilt[:, 7]).all()


def test_places_of_programs():
    """Every block and tile once; those of a few blocks together, in the order of the docstring."""
    found = [tuple(int(each) for each in triton._place(jnp.int32(i), 3, 2, 2)) for i in range(6)]
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    assert [tuple(int(each) for each in triton._place(jnp.int32(i), 3, 2, 1)) for i in range(3)] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]


def test_many_blocks_of_one_expert(rng):
    """Tiles of many rows, which run side by side."""
    x, weight, _ = arrays_of(rng, 150, 2, 48, 64, np.float32)
    chosen = rng.integers(0, 2, (150, 1))
    config = {"block_n": 16, "block_k": 32, "num_warps": 4, "num_stages": 2}
    options = {"gather": True, "scatter": True, "bias": None, "activation": None, "gated": True, "scale": None}

    @jax.jit
    def run(x, weight, chosen):
        plan = plan_experts(chosen, 2, block_rows=64)
        return triton.matmul(x, weight, plan, **options, dtype=np.dtype(np.float32), config=config)

    out = run(x, weight, jnp.asarray(chosen, jnp.int32))
    near(
        out[0],
        np.array([float64_expert(row, weight[e], None) for row, (e,) in zip(x, chosen, strict=True)]),
        np.float32,
    )


def test_differentiable(rng):
    x, chosen, share, gate_up, down = mixture_arrays(rng, 9, 2, 3, 16, 8)

    def dense(x, share, gate_up, down):
        hidden = jnp.einsum("td,eod->teo", x, gate_up[0]) + gate_up[1]
        gate, up = jnp.split(hidden, 2, axis=-1)
        out = jnp.einsum("teo,edo->ted", jax.nn.silu(gate) * up, down[0]) + down[1]
        return jnp.einsum("tk,tkd->ktd", share, jnp.take_along_axis(out, chosen[..., None], axis=1))

    def op(x, share, gate_up, down):
        return mixture(x, chosen, share, gate_up, down, "silu", "xla")

    found, expected = (
        jax.jit(jax.grad(lambda *arrays, fn=fn: jnp.sum(fn(*arrays) ** 2), (0, 1, 2, 3)))(x, share, gate_up, down)
        for fn in (op, dense)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("model", shapes.MODELS)
def test_sizes_for_real_shapes(model, target):
    """No mask along the inner axis, enough programs, and no more shared memory than there is."""
    gpu = Gpu(target.device_kind, target.capability, target.cores)
    mixture = shapes.MODELS[model]
    for tokens in (1, 8, 32, 64, 512, 8192):
        pairs = tokens * mixture.per_token
        rows, busy = default_block_rows(pairs, mixture.count), triton.expected_busy(pairs, mixture.count)
        for name, (out, inner) in mixture.products().items():
            gated = name == "gate_up"
            columns = out // 2 if gated else out
            for dtype in (jnp.bfloat16, np.float32):
                sizes = triton.block_sizes(rows, columns, inner, gated=gated, busy=busy, dtype=dtype, gpu=gpu)
                block_n, block_k = sizes["block_n"], sizes["block_k"]
                assert inner % block_k == 0 and block_k >= 32
                stage = jnp.dtype(dtype).itemsize * block_k * (block_n * (2 if gated else 1) + rows)
                assert sizes["num_stages"] * stage <= target.shared_memory_per_block
                if rows == 16 and dtype == jnp.bfloat16:
                    programs = busy * -(-columns // block_n) / gpu.cores
                    assert programs >= 1
                    assert programs * sizes["num_stages"] * (stage - 2 * block_k * rows) >= triton.IN_FLIGHT


def structs(mixture, tokens, dtype=jnp.bfloat16):
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    pair = tokens, mixture.per_token
    weights = [struct((mixture.count, *shape)) for shape in mixture.products().values()]
    biases = [struct(each.shape[:2]) if mixture.activation == "clamped_swiglu" else None for each in weights]
    gate_up, down = zip(weights, biases, strict=True)
    return (
        struct((tokens, mixture.model_dim)),
        struct(pair, dtype=jnp.int32),
        struct(pair, dtype=jnp.float32),
        gate_up,
        down,
    )


# Every kind of kernel: model, tokens, dtype, target.
COMPILED = {
    "4 of 32 at 512, biases": ("gpt-oss-20b", 512, jnp.float16, "a100"),
    "2 of 8 at 2048": ("mixtral-8x7b", 2048, jnp.bfloat16, "h200"),
    "more than 4 GiB": ("deepseek-v3", 32, jnp.bfloat16, "h200"),
    "float32": ("qwen3-30b-a3b", 4096, np.float32, "a100"),
}


def planned(x, chosen, share, gate_up, down, activation):
    (first, first_bias), (second, second_bias) = gate_up, down
    plan = plan_experts(chosen, first.shape[0])
    hidden = grouped_matmul(x, first, plan, gather=True, bias=first_bias, activation=activation)
    return grouped_matmul(hidden, second, plan, scatter=True, bias=second_bias, scale=share, dtype=jnp.float32)


@pytest.mark.parametrize("case", COMPILED)
def test_compiled(gpu_compiler, case):
    """Nothing spilled, and on the tensor cores: on Hopper those of a warp group where rows are many."""
    model, tokens, dtype, target = COMPILED[case]
    mixture = shapes.MODELS[model]
    run = functools.partial(planned, activation=mixture.activation)
    found = kernel_resources(run, *structs(mixture, tokens, dtype), target=target)
    products = [needs for name, needs in found.items() if name.startswith(triton.OP)]
    assert len(products) == 2 and ("plan_experts" in found) == (tokens * mixture.per_token <= 4096)
    for needs in found.values():
        assert needs.spill_bytes == 0
    for needs in products:
        kinds = {"wgmma"} if target == "h200" and tokens > 1000 else {"mma.sync"}
        assert set(needs.tensor_core_instructions) == (kinds if dtype != np.float32 else set())
        assert needs.shared_memory <= TARGETS[target].shared_memory_per_block


def test_launches(gpu_compiler):
    """A plan and two products, with bias, activation, gather, weights and scatter in them."""
    mixture = shapes.MODELS["gpt-oss-20b"]
    compiled = compile_for(functools.partial(planned, activation=mixture.activation), *structs(mixture, 32))
    launches = [each for each in entry_instructions(compiled) if each.opcode not in ("parameter", "bitcast")]
    assert [each.opcode for each in launches if each.opcode != "get-tuple-element"] == ["custom-call"] * 3


def test_refusals(rng):
    matmul = inspect.unwrap(grouped_matmul)  # as users have them: without the tests' own shape checks
    make = inspect.unwrap(plan_experts)
    x, weight, bias = arrays_of(rng, 4, 3, 6, 8, np.float32)
    plan = plan_experts(jnp.zeros((4, 2), jnp.int32), 3)
    for arrays, options, message in (
        ((x, weight[0]), {}, r"must be \[rows, D\] and \[E, O, D\]"),
        ((x[:, :5], weight), {}, r"x \(4, 5\) and weight \(3, 6, 8\)"),
        ((x, weight[:2]), {}, "is of 2 experts, the plan of 3"),
        ((x, weight), {}, "a row for each pair of the plan, which has 8"),
        ((x[:3], weight), {"gather": True}, "a row for each token of the plan, which has 4"),
        ((x.astype(jnp.int32), weight), {"gather": True}, "x is int32"),
        ((x, weight), {"gather": True, "bias": bias[:2]}, "an entry for each row of the weights"),
        ((x, weight), {"gather": True, "activation": "swish"}, "activation='swish' is unknown; there are .*'clamped"),
        ((x, weight), {"gather": True, "activation": "clamped_swiglu", "gated": False}, "can not be gated=False"),
        ((x, weight[:, :5]), {"gather": True, "activation": "silu"}, "has an odd number"),
        ((x, weight), {"gather": True, "scale": jnp.ones(4)}, r"scale \(4,\) must be \(4, 2\)"),
        ((x, weight), {"gather": True, "implementation": "cuda"}, "'cuda' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul(*arrays, plan, **options)
    for chosen, experts, options, message in (
        (jnp.zeros((0, 2), jnp.int32), 3, {}, "there must be a pair and an expert"),
        (jnp.zeros((1, 2), jnp.int32), 0, {}, "there must be a pair and an expert"),
        (jnp.zeros((1, 2), jnp.int32), 3, {"block_rows": 48}, "block_rows=48 must be a power of two from 16 on"),
        (jnp.zeros((4097, 1), jnp.int32), 3, {"implementation": "triton"}, "for at most 4096"),
        (jax.ShapeDtypeStruct((2**20, 8), jnp.int32), 256, {}, "than 32-bit keys tell apart"),
    ):
        with pytest.raises(ValueError, match=message):
            make(chosen, experts, **options)
    with pytest.raises(UnsupportedError, match="x is float32 and the weights bfloat16"):
        grouped_matmul(x, weight.astype(jnp.bfloat16), plan, gather=True, implementation="triton")
