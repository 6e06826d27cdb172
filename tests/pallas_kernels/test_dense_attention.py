"""Every backend of dense attention, forwards and backwards, against float64 on the host."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import cudnn, dense_attention, xla
from pallas_kernels.targets import compile_for, entry_instructions, memory

# What each feature is given as where it is on.
FEATURES = {
    "lengths": np.array([29, 40, 0], np.int32),
    "causal": False,
    "window": 9,
    "scale": 0.3,
    "soft_cap": 2.0,
    "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625, 0.0, 0.3], np.float32),
    "sinks": np.array([0.5, -1.0, 3.0, 0.0, 2.0, -20.0], np.float32),
}
# An orthogonal array: eight calls in which every two features are met on and on, on and off, off and on, off and off.
CALLS = [
    {name: value for column, (name, value) in enumerate(FEATURES.items(), 1) if (row & column).bit_count() % 2}
    for row in range(8)
]
DIFFERENTIABLE = ("alibi_slopes", "sinks")


def make_arrays(rng, batch=3, queries=40, keys=None, heads=6, kv_heads=2, head_dim=16, dtype=jnp.float32):
    """Queries, keys and values, and a cotangent of the result."""
    keys = queries if keys is None else keys
    shapes = [(batch, queries, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (*shapes, shapes[0])]


def float64_attention(q, k, v, ct, *, lengths=None, causal=True, window=None, scale=None, soft_cap=None,
                      alibi_slopes=None, sinks=None):  # fmt: skip
    """The result, and the gradients of queries, keys, values, slopes and sinks."""
    q, k, v, ct = (np.asarray(x, np.float64) for x in (q, k, v, ct))
    (batch, queries, heads, head_dim), keys, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    distance = np.arange(keys) - np.arange(queries)[:, None]
    seen = np.ones((batch, 1, queries, keys), bool)
    real_keys, real_queries = np.ones((batch, keys), bool), np.ones((batch, queries), bool)
    if lengths is not None:
        real_keys = np.arange(keys) < lengths[:, None]
        real_queries = real_keys if queries == keys else real_queries
    seen &= real_keys[:, None, None, :] & real_queries[:, None, :, None]
    seen &= (distance <= 0) | (not causal)
    seen &= (np.abs(distance) < window) if window is not None else True
    q, k, v = (
        np.where(real[:, :, None, None], x, 0) for real, x in ((real_queries, q), (real_keys, k), (real_keys, v))
    )

    products = np.einsum("bqnh,bknh->bnqk", q, k) * scale
    capped = products if soft_cap is None else soft_cap * np.tanh(products / soft_cap)
    slopes = np.zeros(heads) if alibi_slopes is None else alibi_slopes.astype(np.float64)
    scores = np.where(seen, capped + slopes[:, None, None] * distance, -np.inf)
    sink = np.full(heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    sink = np.broadcast_to(sink[:, None], scores.shape[:-1])
    highest = np.maximum(scores.max(-1), sink)
    highest = np.where(np.isfinite(highest), highest, 0)
    exponents, of_sink = np.exp(scores - highest[..., None]), np.exp(sink - highest)
    total = exponents.sum(-1) + of_sink
    weights = exponents / np.where(total == 0, 1, total)[..., None]
    out = np.einsum("bnqk,bknh->bqnh", weights, v)

    by_weight = np.einsum("bqnh,bknh->bnqk", ct, v)
    mean = (weights * by_weight).sum(-1)
    by_score = weights * (by_weight - mean[..., None])
    by_product = by_score * (1 if soft_cap is None else 1 - (capped / soft_cap) ** 2) * scale

    def grouped(x):
        return x.reshape(batch, keys, heads // group, group, head_dim).sum(3)

    return out, {
        "q": np.einsum("bnqk,bknh->bqnh", by_product, k),
        "k": grouped(np.einsum("bnqk,bqnh->bknh", by_product, q)),
        "v": grouped(np.einsum("bnqk,bqnh->bknh", weights, ct)),
        "alibi_slopes": (by_score * distance).sum((0, 2, 3)),
        "sinks": -(of_sink / np.where(total == 0, 1, total) * mean * real_queries[:, None]).sum((0, 2)),
    }


def run(arrays, implementation=None, **options):
    """The result and the gradients, as `float64_attention` gives them, from one compiled program."""
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
    dynamic = {name: jnp.asarray(x) for name, x in options.items() if isinstance(x, np.ndarray)}

    @jax.jit
    def both(q, k, v, ct, dynamic):
        learned = {name: dynamic[name] for name in DIFFERENTIABLE if name in dynamic}
        given = {name: x for name, x in dynamic.items() if name not in learned}
        call = functools.partial(dense_attention, implementation=implementation, **given, **static)
        out, pull = jax.vjp(lambda q, k, v, learned: call(q, k, v, **learned), q, k, v, learned)
        *by_input, by_learned = pull(ct)
        return out, dict(zip("qkv", by_input, strict=True)) | by_learned

    return both(*arrays, dynamic)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries, so that a short batch has several, the last of them part empty."""
    monkeypatch.setattr(xla, "CPU_BYTES", 0)
    monkeypatch.setattr(xla, "MIN_BLOCK", 16)


def check(arrays, options, implementation):
    out, gradients = run(arrays, implementation, **options)
    expected, expected_gradients = float64_attention(*arrays, **options)
    np.testing.assert_allclose(out, expected, rtol=5e-4, atol=5e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[name], rtol=5e-4, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("options", CALLS, ids=lambda options: "+".join(options) or "plain")
def test_features(implementation, options, rng):
    check(make_arrays(rng), options, implementation)


@pytest.mark.parametrize("options", CALLS, ids=lambda options: "+".join(options) or "plain")
def test_features_in_blocks(options, rng, small_blocks):
    check(make_arrays(rng), options, "xla")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_cross_attention(implementation, rng, small_blocks):
    """Another number of keys than of queries; lengths are those of the keys."""
    arrays = make_arrays(rng, queries=21, keys=50, heads=4, kv_heads=1)
    options = {"causal": False, "lengths": np.array([50, 7, 1], np.int32), "soft_cap": 3.0}
    check(arrays, options | {"sinks": np.array([0.0, 1.0, 2.0, 3.0], np.float32)}, implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_may_hold_anything(implementation, rng):
    """NaN in the padding reaches neither results nor gradients, and the padding of both is zero."""
    arrays, lengths = make_arrays(rng), np.array([29, 40, 0], np.int32)
    padding = np.arange(40) >= lengths[:, None]
    dirty = [jnp.where(padding[:, :, None, None], jnp.nan, x) for x in arrays[:3]]
    clean = run(arrays, implementation, lengths=lengths)
    out, gradients = run([*dirty, arrays[3]], implementation, lengths=lengths)
    jax.tree.map(np.testing.assert_array_equal, (out, gradients), clean)
    for x in (out, *gradients.values()):
        assert not np.asarray(x)[padding].any()


@pytest.mark.parametrize("window, causal", [(None, True), (1, True), (40, True), (9, False), (1000, True)])
def test_as_in_torch(window, causal, rng, small_blocks):
    torch = pytest.importorskip("torch")
    arrays = make_arrays(rng, heads=8, kv_heads=2, head_dim=32)
    q, k, v, ct = (torch.from_numpy(np.array(x)).transpose(1, 2).requires_grad_() for x in arrays)
    distance = torch.arange(40) - torch.arange(40)[:, None]
    mask = ((distance <= 0) | (not causal)) & (distance.abs() < (window or 40))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected.backward(ct)
    out, gradients = run(arrays, window=window, causal=causal)
    np.testing.assert_allclose(out, expected.detach().transpose(1, 2), rtol=1e-5, atol=2e-6)
    for name, x in zip("qkv", (q, k, v), strict=True):
        np.testing.assert_allclose(gradients[name], x.grad.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_as_in_jax(window, rng):
    """What the decoder's dense attention was before there was this op: equal to 1e-6."""
    q, k, v, _ = make_arrays(rng, heads=9, kv_heads=3, head_dim=64)
    local = None if window is None else (window - 1, 0)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    out = jax.jit(functools.partial(dense_attention, window=window))(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_as_exact_as_plain(dtype, head_dim, rng, monkeypatch):
    """The error is at most 1.1 times that of a plain implementation in the same precision."""
    monkeypatch.setattr(xla, "CPU_BYTES", 0)
    arrays = make_arrays(rng, batch=1, queries=256, head_dim=head_dim, dtype=dtype)
    expected, _ = float64_attention(*arrays)

    def error(out):
        return np.sqrt(np.mean((np.asarray(out, np.float64) - expected) ** 2))

    plain = error(jax.nn.dot_product_attention(*arrays[:3], is_causal=True))
    for implementation in ("xla", "reference"):
        out = jax.jit(functools.partial(dense_attention, implementation=implementation))(*arrays[:3])
        assert out.dtype == dtype
        assert error(out) <= 1.1 * plain


def program(queries, target=None, gradient=False, dtype=jnp.float32, heads=8, **options):
    """The compiled op over rows of that many queries."""
    q, k = (jax.ShapeDtypeStruct((1, queries, n, 64), dtype) for n in (heads, 2))
    call = functools.partial(dense_attention, **options)
    if gradient:
        call = jax.grad(lambda *arrays: jnp.sum(dense_attention(*arrays, **options) ** 2), argnums=(0, 1, 2))
    return compile_for(call, q, k, k, target=target) if target else jax.jit(call).lower(q, k, k).compile()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 1024, "soft_cap": 30.0}], ids=str)
def test_memory_grows_linearly(gradient, options):
    short, long = (memory(program(queries, None, gradient, **options)).temporaries for queries in (4096, 8192))
    assert long < 2.1 * short
    assert long < 8192**2 * 8 * 4 / 2, "less than half of all scores in float32"


def test_short_rows_have_no_loop():
    def opcodes(queries):
        return {each.opcode for each in entry_instructions(program(queries, gradient=True))}

    assert "while" not in opcodes(256)
    assert "while" in opcodes(4096)


@pytest.mark.parametrize("target", ["a100", "h200"])
def test_xla_compiles_for_gpus(target, gpu_compiler):
    compiled = program(8192, target, True, jnp.bfloat16, soft_cap=30.0)
    assert memory(compiled).temporaries < 8192**2 * 8 * 4 / 2, "less than half of all scores in float32"


def lowered(kind, dtype=jnp.bfloat16, queries=256, head_dim=64, gradient=False, lengths=False, **options):
    """The program that is made on a machine with that GPU, before it is compiled."""
    q, k = (jax.ShapeDtypeStruct((2, queries, n, head_dim), dtype) for n in (8, 2))
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    if lengths:
        arrays["lengths"] = jax.ShapeDtypeStruct((2,), jnp.int32)

    def call(q, k, v, arrays):
        return dense_attention(q, k, v, **options | arrays)

    fn = jax.grad(lambda *arrays: jnp.sum(call(*arrays)), argnums=(0, 1, 2)) if gradient else call
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device)):
        return jax.jit(fn).trace(q, k, k, arrays).lower(lowering_platforms=("cuda",)).as_text()


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("
PER_HEAD = jax.ShapeDtypeStruct((8,), jnp.float32)


@pytest.fixture
def cudnn_version(monkeypatch):
    """As if cuDNN were installed: JAX asks for its version while it traces, and only XLA needs the library."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
def test_cudnn_is_chosen(kind, cudnn_version):
    text = lowered(kind)
    assert FORWARD in text and r"mask_type\22: \22CAUSAL\22" in text and r"sliding_window_length\22: 0" in text


def test_what_cudnn_is_given(cudnn_version):
    assert r"mask_type\22: \22PADDING_CAUSAL\22" in lowered("NVIDIA H200", lengths=True)
    assert r"mask_type\22: \22PADDING\22" in lowered("NVIDIA H200", lengths=True, causal=False)
    assert r"mask_type\22: \22NO_MASK\22" in lowered("NVIDIA H200", causal=False)
    # Both here and in cuDNN the window counts the query itself: it starts past the key that is `window` before.
    assert r"sliding_window_length\22: 100" in lowered("NVIDIA H200", window=100)
    assert r"sliding_window_length\22: 0" in lowered("NVIDIA H200", window=256), "a window that hides nothing is none"
    assert r"fmha_scale\22: 0.5" in lowered("NVIDIA H200", scale=0.5)
    text = lowered("NVIDIA H200", dtype=jnp.float16, gradient=True, lengths=True, window=100)
    assert FORWARD in text and BACKWARD in text


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False}, {"causal": False, "lengths": True}], ids=str)
def test_cudnn_takes_odd_lengths(options, cudnn_version):
    """JAX refuses them backwards, so that falling back would come too late."""
    assert BACKWARD in lowered("NVIDIA H200", queries=77, gradient=True, **options)


@pytest.mark.parametrize("lengths", [None, np.array([29, 40, 0], np.int32)], ids=["full", "padded"])
@pytest.mark.parametrize(
    "queries, keys, options",
    [
        (40, 40, {}),
        (41, 41, {}),
        (41, 41, {"window": 9}),
        (41, 41, {"causal": False, "scale": 0.3}),
        (21, 50, {"causal": False}),
        (20, 51, {"causal": False}),
    ],
)
def test_what_cudnn_computes(queries, keys, options, lengths, rng, monkeypatch):
    """The call that is made of cuDNN, computed by JAX's own implementation of the same function."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **y: call(*x, **y | {"implementation": "xla"}))
    monkeypatch.setattr(cudnn, "refusals", lambda *x, **y: [])
    check(make_arrays(rng, queries=queries, keys=keys), options | {"lengths": lengths}, "cudnn")


@pytest.mark.parametrize(
    "kind, options, reason",
    [
        ("NVIDIA H200", {"dtype": jnp.float32}, "queries are float32"),
        ("NVIDIA H200", {"head_dim": 68}, "head size 68"),
        ("NVIDIA H200", {"head_dim": 264}, "multiple of 8 up to 256"),
        ("NVIDIA A100-SXM4-80GB", {"head_dim": 256}, "multiple of 8 up to 128"),
        ("NVIDIA H200", {"soft_cap": 30.0}, "it has no soft_cap"),
        ("NVIDIA H200", {"alibi_slopes": PER_HEAD, "sinks": PER_HEAD}, "it has no alibi_slopes; it has no sinks"),
        ("NVIDIA H200", {"window": 9, "causal": False}, "windows for causal attention only"),
        ("Tesla T4", {}, "compute capability 7.5"),
    ],
)
@pytest.mark.filterwarnings("ignore:Tesla T4 is older")
def test_what_cudnn_refuses(kind, options, reason, cudnn_version):
    assert FORWARD not in lowered(kind, **options)
    with pytest.raises(dispatch.UnsupportedError, match=reason):
        lowered(kind, implementation="cudnn", **options)


def test_without_cudnn(monkeypatch, rng):
    """A GPU whose machine has no cuDNN, and a machine with no GPU."""

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", missing)
    assert FORWARD not in lowered("NVIDIA H200")
    with pytest.raises(dispatch.UnsupportedError, match="cuDNN is not detected"):
        lowered("NVIDIA H200", implementation="cudnn")
    with pytest.raises(dispatch.UnsupportedError, match="there is no NVIDIA GPU"):
        dense_attention(*make_arrays(rng)[:3], implementation="cudnn")


@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=str)
def test_cudnn_compiles(options, gpu_compiler):
    """Where cuDNN is installed beside the compiler (`nvidia-cudnn-cu12`), the whole way."""
    try:
        compiled = program(256, "h200", True, jnp.bfloat16, implementation="cudnn", **options)
    except dispatch.UnsupportedError as error:
        pytest.skip(str(error))
    text = compiled.as_text()
    assert text is not None and "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


def test_refusals(rng):
    call = inspect.unwrap(dense_attention)  # as users have it: without the tests' own shape checks
    q, k, v, _ = make_arrays(rng)
    for changed, options, message in (
        ((q, k, v), {"implementation": "flash"}, "'flash' is unknown"),
        ((q, k, v[:, :-1]), {}, r"must both be \[3, Lk, K, 16\]"),
        ((q, k[:2], v[:2]), {}, "to fit queries"),
        ((q, k, v.astype(jnp.bfloat16)), {}, "float32, float32 and bfloat16"),
        ((q[:, :, :5], k, v), {}, "2 key heads do not divide 5"),
        ((q[:, :20], k, v), {}, "20 queries and 40 keys"),
        ((q[:, :20], k, v), {"causal": False, "window": 3}, "no common positions"),
        ((q, k, v), {"lengths": jnp.ones(4, jnp.int32)}, r"int32\[3\]"),
        ((q, k, v), {"window": 0}, "window=0"),
        ((q, k, v), {"soft_cap": 0.0}, "soft_cap=0.0"),
        ((q, k, v), {"sinks": jnp.ones(5)}, "sinks"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*changed, **options)
