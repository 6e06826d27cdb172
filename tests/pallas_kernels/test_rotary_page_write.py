"""Every backend of rotary and page write against float64 on the host."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, targets
from pallas_kernels.resources import read_resources
from pallas_kernels.rotary_page_write import rotary_page_write, triton
from pallas_kernels.rotary_page_write.api import BACKENDS
from pallas_kernels.rotary_page_write.reference import reciprocal
from pallas_kernels.rotary_page_write.shapes import SHAPES, Shape, arguments
from pallas_kernels.targets import compile_for, entry_instructions, large_copies, memory

# DeepSpeed's own suite: (relative, absolute).
TOLERANCE = {
    jnp.dtype(jnp.float32): (5e-4, 5e-5),
    jnp.dtype(jnp.float16): (3e-2, 2e-3),
    jnp.dtype(jnp.bfloat16): (4.8e-1, 3.2e-2),
}
# (new tokens, tokens seen before) of each sequence, from DeepSpeed's lists for blocked copy and blocked rotary.
BATCH = [(1, 0), (17, 0), (33, 15), (63, 1), (117, 88), (1, 293)]
LARGEST = {"int8": 127, "float8_e4m3fn": 448, "float8_e5m2": 57344}
NO_PAGE = (-1, -(2**31), 2**31 - 1)


def places(rng, batch, page_size, padding):
    """Page and offset of each new token, in pages drawn at random, and at the end tokens without a page."""
    pages_of = [-(-(new + seen) // page_size) for new, seen in batch]
    order = rng.permutation(sum(pages_of) + 2)
    page, offset, first = [], [], 0
    for (new, seen), count in zip(batch, pages_of, strict=True):
        position = np.arange(seen, seen + new)
        page.extend(order[first + position // page_size])
        offset.extend(position % page_size)
        first += count
    page += [order.size, *NO_PAGE][:padding]
    offset += [page_size - 1] * padding
    return order.size, np.asarray(page, np.int32), np.asarray(offset, np.int32)


def make_call(rng, shape, batch=BATCH, page_size=64, dtype=jnp.float32, page_dtype=None, padding=4):
    """Arguments of a call; every byte of the pages is random, so that a stray write shows."""
    num_pages, page, offset = places(rng, batch, page_size, padding)
    abstract, options = arguments(shape, page.size, dtype, page_dtype, num_pages, page_size)

    def random(struct):
        if struct.dtype.itemsize == 1:
            codes = rng.integers(0, 256, struct.shape, np.uint8).view(struct.dtype)
            # On a CPU XLA moves float8 by way of wider types, in which not every NaN keeps its bits.
            return jnp.asarray(np.where(np.isnan(codes.astype(np.float32)), np.ones((), struct.dtype), codes))
        return jnp.asarray(rng.normal(size=struct.shape), struct.dtype)

    qkv, keys, values = (random(struct) for struct in abstract[:3])
    options = {name: random(x) if isinstance(x, jax.ShapeDtypeStruct) else x for name, x in options.items()}
    if shape.half:
        angle = rng.uniform(0, 2 * math.pi, (page.size, shape.half))
        options["cos"], options["sin"] = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return [qkv, keys, values, jnp.asarray(page), jnp.asarray(offset)], options


@functools.partial(jax.jit, static_argnames=("interleaved", "norm_eps", "norm_offset", "q_dtype", "implementation"))
def run(*arrays, **options):
    return rotary_page_write(*arrays, **options)


def float64_rows(arrays, options, norm_eps=1e-6):
    """Queries, keys and values as they should be, in float64."""
    qkv, kv_heads = np.asarray(arrays[0], np.float64), arrays[1].shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    rows = []
    for x, weight in ((qkv[:, :heads], options["q_norm"]), (qkv[:, heads:-kv_heads], options["k_norm"])):
        if weight is not None:
            weight = np.asarray(weight, np.float64) + options.get("norm_offset", 0)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm_eps) * weight
        if options["cos"] is not None:
            half = options["cos"].shape[1]
            x = x.copy()
            for pair in range(half):
                i, j = (2 * pair, 2 * pair + 1) if options["interleaved"] else (pair, pair + half)
                cos, sin = (np.asarray(options[name], np.float64)[:, None, pair] for name in ("cos", "sin"))
                x[..., i], x[..., j] = x[..., i] * cos - x[..., j] * sin, x[..., j] * cos + x[..., i] * sin
        rows.append(x)
    return [*rows, qkv[:, -kv_heads:]]


def bits(x):
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


def written(buffer, page, offset):
    """What lies at the places of the real tokens, a row of each, and which tokens those are."""
    is_real = (page >= 0) & (page < buffer.shape[0])
    return np.asarray(buffer)[page[is_real], :, offset[is_real]], is_real


def check_untouched(before, after, page, offset):
    """Bit for bit the same, but at the places of real tokens."""
    before, after = bits(before).copy(), bits(after)
    is_real = (page >= 0) & (page < before.shape[0])
    before[page[is_real], :, offset[is_real]] = after[page[is_real], :, offset[is_real]]
    np.testing.assert_array_equal(before, after)


def check(arrays, options, out):
    """Everything that holds for every call."""
    page, offset = (np.asarray(x) for x in arrays[3:])
    q, keys, values = float64_rows(arrays, options)
    relative, absolute = TOLERANCE[arrays[0].dtype]
    assert out.q.dtype == arrays[0].dtype
    np.testing.assert_allclose(np.asarray(out.q, np.float64), q, rtol=relative, atol=absolute)
    for name, expected, old in (("key", keys, arrays[1]), ("value", values, arrays[2])):
        pages, scales = getattr(out, f"{name}_pages"), getattr(out, f"{name}_scales")
        assert (pages.dtype, pages.shape) == (old.dtype, old.shape)
        check_untouched(old, pages, page, offset)
        got, is_real = written(pages, page, offset)
        got, expected = got.astype(np.float64), expected[is_real]
        if scales is None:
            relative, absolute = TOLERANCE[pages.dtype]
            np.testing.assert_allclose(got, expected, rtol=relative, atol=absolute)
            continue
        check_untouched(options[f"{name}_scales"], scales, page, offset)
        scale = written(scales, page, offset)[0].astype(np.float64)
        largest = np.abs(expected).max(-1) / LARGEST[pages.dtype.name]
        np.testing.assert_allclose(scale, np.maximum(largest, np.finfo(np.float32).tiny), rtol=1e-5)
        error, scale = np.abs(got * scale[..., None] - expected), scale[..., None]
        if pages.dtype == jnp.int8:
            bound = scale / 2
        else:  # half a step: relative to the number, or of the subnormal ones
            info = ml_dtypes.finfo(pages.dtype)
            bound = np.maximum(np.abs(expected) * float(info.eps) / 2, float(info.smallest_subnormal) / 2 * scale)
        assert (error <= bound * (1 + 1e-5) + 1e-6 * scale).all()


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    "head_dim, dtype", [(64, jnp.bfloat16), (80, jnp.float16), (96, jnp.float32), (128, jnp.float16)]
)
def test_blocked_kv_copy(implementation, head_dim, dtype, rng):
    """DeepSpeed's `test_blocked_kv_copy`: without rotary, the pages hold exactly what the projection gave."""
    arrays, options = make_call(rng, Shape(16, 16, head_dim, 0), BATCH[:4], dtype=dtype)
    out = run(*arrays, **options, implementation=implementation)
    page, offset = (np.asarray(x) for x in arrays[3:])
    np.testing.assert_array_equal(bits(out.q), bits(arrays[0][:, :16]))
    for old, pages, rows in zip(arrays[1:3], out[1:3], (arrays[0][:, 16:32], arrays[0][:, 32:]), strict=True):
        check_untouched(old, pages, page, offset)
        got, is_real = written(pages, page, offset)
        np.testing.assert_array_equal(got, np.asarray(rows)[is_real])


ROTARY = {
    "head 64, 3 a group": (Shape(9, 3, 64, 32), jnp.float32),
    "head 80, 7 a group": (Shape(7, 1, 80, 40), jnp.float16),
    "head 96": (Shape(4, 4, 96, 48), jnp.float32),
    "64 of 80": (Shape(4, 2, 80, 32), jnp.float32),
    "64 of 96, norm": (Shape(8, 4, 96, 32, norm=True), jnp.bfloat16),
    "interleaved": (Shape(3, 1, 64, 32, interleaved=True), jnp.float32),
    "interleaved, 40 of 80, norm": (Shape(2, 2, 80, 20, interleaved=True, norm=True), jnp.float32),
    "norm alone": (Shape(2, 2, 48, 0, norm=True), jnp.float32),
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ROTARY)
def test_blocked_rotary(implementation, name, rng):
    """DeepSpeed's `test_blocked_rotary_emb`, with its head sizes, groups and partial rotations."""
    shape, dtype = ROTARY[name]
    arrays, options = make_call(rng, shape, dtype=dtype)
    check(arrays, options, run(*arrays, **options, implementation=implementation))


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("without", ["q_norm", "k_norm", None])
def test_norm_with_offset(implementation, without, rng):
    """Scales stored less one in 16 bits, as Gemma3 has them, are added to in float32; each norm goes without the other.

    Next to one, steps of bfloat16 are four to eight times as large as these scales.
    """
    arrays, options = make_call(rng, Shape(2, 1, 48, 16, norm=True), BATCH[:2], dtype=jnp.float32)
    weight = jnp.asarray(rng.normal(size=48) * 1e-3, jnp.bfloat16)
    options |= {"q_norm": weight, "k_norm": weight, "norm_offset": 1.0} | ({without: None} if without else {})
    check(arrays, options, run(*arrays, **options, implementation=implementation))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_partial_sums(implementation, rng):
    """The projection in parts, as split products give it, and queries in a dtype of their own."""
    arrays, options = make_call(rng, Shape(4, 2, 80, 40, norm=True), BATCH[:3], page_dtype=jnp.bfloat16)
    parts = jnp.asarray(rng.normal(size=(3, *arrays[0].shape)), jnp.float32)
    parts = parts.at[2].set(arrays[0] - parts[0] - parts[1])
    out = run(parts, *arrays[1:], **options, q_dtype="float16", implementation=implementation)
    assert out.q.dtype == jnp.float16
    check([arrays[0].astype(jnp.float16), *arrays[1:]], options, out)


def test_as_in_transformers(rng):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    arrays, options = make_call(rng, Shape(4, 2, 64, 32), [(33, 15)], padding=0)
    qkv, cos, sin = (torch.from_numpy(np.array(x)) for x in (arrays[0], options["cos"], options["sin"]))
    cos, sin = (torch.cat([x, x], -1)[None] for x in (cos, sin))
    q, k = llama.apply_rotary_pos_emb(qkv[None, :, :4], qkv[None, :, 4:6], cos, sin, unsqueeze_dim=2)
    for implementation in BACKENDS:
        out = run(*arrays, **options, implementation=implementation)
        got, _ = written(out.key_pages, *(np.asarray(x) for x in arrays[3:]))
        np.testing.assert_allclose(out.q, q[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got, k[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)])
def test_given_frequencies_far_out(implementation, dtype, tolerance, rng):
    """DeepSpeed's accuracy test of given frequencies: position 4095, 40 and 8 heads of 128, base 1e6."""
    arrays, options = make_call(rng, Shape(40, 8, 128, 64), [(1, 4095)], dtype=dtype, padding=0)
    frequencies = (1.0 / 1e6 ** (np.arange(0, 128, 2) / 128)).astype(np.float32)
    angle = jnp.full((1, 1), 4095.0) * frequencies
    out = run(*arrays, **options | {"cos": jnp.cos(angle), "sin": jnp.sin(angle)}, implementation=implementation)
    exact = 4095.0 * frequencies.astype(np.float64)[None]
    q, k, _ = float64_rows(arrays, options | {"cos": np.cos(exact), "sin": np.sin(exact)})
    got, _ = written(out.key_pages, *(np.asarray(x) for x in arrays[3:]))
    for found, wanted in ((out.q, q), (got, k)):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("page_dtype", LARGEST)
def test_quantized(page_dtype, rng):
    """Round trip within half a step, a row of zeros too; the same bytes from every backend where all is exact."""
    arrays, options = make_call(rng, Shape(9, 3, 80, 40), page_dtype=page_dtype, page_size=16)
    arrays[0] = arrays[0].at[3].set(0).at[7].multiply(1e-30).at[8].multiply(1e30)
    outs = {name: run(*arrays, **options, implementation=name) for name in BACKENDS}
    for out in outs.values():
        check(arrays, options, out)
        np.testing.assert_array_equal(bits(out.value_pages), bits(outs["reference"].value_pages))
        np.testing.assert_array_equal(bits(out.value_scales), bits(outs["reference"].value_scales))

    options |= {"cos": None, "sin": None}
    outs = {name: run(*arrays, **options, implementation=name) for name in BACKENDS}
    for out in outs.values():
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), out[1:], outs["reference"][1:])


@pytest.mark.parametrize(
    ("page_dtype", "shape"),
    [("int8", Shape(4, 2, 80, 20)), ("float8_e4m3fn", Shape(4, 2, 64, 32, interleaved=True))],
)
def test_words_hold_the_same_bytes(page_dtype, shape, rng, monkeypatch):
    """What pools of 2 to 4 GiB are written in."""
    arrays, options = make_call(rng, shape, BATCH[:3], page_dtype=page_dtype, page_size=16)
    names = "interleaved", "implementation"
    results = []
    for needed in (False, True):
        monkeypatch.setattr(triton, "_needs_words", lambda pool, needed=needed: needed)
        call = jax.jit(lambda *arrays, **options: rotary_page_write(*arrays, **options), static_argnames=names)
        results.append(call(*arrays, **options, implementation="triton"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), *results)


@pytest.mark.parametrize("page_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_integer_rounding_to_float8(page_dtype, rng):
    """The kernel's own conversion equals that of ml_dtypes on every code, every tie, and next to every tie."""
    dtype = np.dtype(page_dtype)
    codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    ties = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate([codes, ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf), [-0.0, 1e-40]])
    x = np.concatenate([x, rng.normal(size=5000) * 2.0 ** rng.integers(-20, 6, 5000)]).astype(np.float32)
    x = x[np.abs(x) <= LARGEST[page_dtype]]
    got = jax.jit(lambda x: triton._encode(x, dtype))(x)
    np.testing.assert_array_equal(bits(got), x.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("wrong", [-2, -1, 0, 1, 2])
def test_reciprocals_are_exact(wrong, rng):
    """Whatever a compiler takes for `1 / x`, at powers of two and next to them as well."""
    powers = 2.0 ** np.arange(-126, 126)
    x = np.concatenate([powers, np.nextafter(powers, 1e38, dtype=np.float32), powers * rng.uniform(1, 2, powers.size)])
    x = x.astype(np.float32)
    exact = (1 / x.astype(np.float64)).astype(np.float32)
    approximation = (exact.view(np.int32) + wrong).view(np.float32)
    np.testing.assert_array_equal(jax.jit(reciprocal)(x, approximation), exact)


@pytest.mark.parametrize("rows, num_warps", [(1, 1), (2, 1), (32, 8)])
def test_every_block_size_gives_the_same(rows, num_warps, rng, monkeypatch):
    """Tuned blocks: one row, fewer rows than heads, more rows than there are heads and tokens together."""
    arrays, options = make_call(rng, Shape(4, 2, 32, 16), [(5, 11), (2, 0)], page_size=16)
    expected = run(*arrays, **options, implementation="triton")
    calls = []

    def tuned(op, gpu, **shape):
        calls.append((op, shape))
        return {"rows": rows, "num_warps": num_warps}

    monkeypatch.setattr(dispatch, "tuned", tuned)
    out = jax.jit(functools.partial(rotary_page_write, interleaved=False, implementation="triton"))(
        *arrays, **{name: x for name, x in options.items() if name != "interleaved"}
    )
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    assert calls == [
        (
            "rotary_page_write",
            dict(tokens=16, heads=4, kv_heads=2, head_dim=32, dtype="float32", page_dtype="float32"),
        )
    ]


def test_blocks_fill_the_gpu():
    """Few tokens: a row a program, so that all multiprocessors have work; many: whole tiles of 16 bytes a load."""
    gpu = dispatch.Gpu("NVIDIA H200", (9, 0), 132)
    assert triton.block_sizes(1, 32, 8, 128, gpu) == {"rows": 1, "num_warps": 1}
    assert triton.block_sizes(32, 32, 8, 128, gpu) == {"rows": 2, "num_warps": 1}
    assert triton.block_sizes(8192, 32, 8, 128, gpu) == {"rows": 16, "num_warps": 4}
    assert triton.block_sizes(8192, 71, 1, 80, gpu) == {"rows": 16, "num_warps": 4}


def test_no_tokens(rng):
    arrays, options = make_call(rng, Shape(4, 2, 32, 16), [], page_size=16, padding=0)
    for implementation in ("xla", "reference"):
        out = run(*arrays, **options, implementation=implementation)
        assert out.q.shape == (0, 4, 32)
        np.testing.assert_array_equal(out.key_pages, arrays[1])
    with pytest.raises(dispatch.UnsupportedError, match="no tokens"):
        run(*arrays, **options, implementation="triton")


def test_refusals(rng):
    call = inspect.unwrap(rotary_page_write)  # as users have it: without the tests' own shape checks
    arrays, options = make_call(rng, Shape(4, 2, 32, 16), [(3, 0)], padding=0)
    qkv, keys, values, page, offset = arrays
    scales = jnp.ones(keys.shape[:3])
    codes = keys.astype(jnp.int8)
    for changed, more, message in (
        (arrays, {"implementation": "mosaic"}, "'mosaic' is unknown"),
        ((qkv.astype(jnp.int8), *arrays[1:]), {}, "qkv is int8"),
        ((qkv[:, :4], *arrays[1:]), {}, r"no query heads.*\[T, N \+ 2 \* K, H\]"),
        ((qkv[..., :16], *arrays[1:]), {}, "heads of 16"),
        ((qkv, keys, values[:-1], page, offset), {}, "must be alike"),
        ((qkv, keys, codes, page, offset), {}, "must be alike"),
        ((qkv, keys, values, page[:2], offset), {}, r"page is int32\(2,\)"),
        ((qkv, keys, values, page, offset.astype(jnp.int8)), {}, "offset is int8"),
        ((qkv[None, :0], *arrays[1:]), {}, "must be int32"),
        ((qkv[None][:0], *arrays[1:]), {}, "no partial sums"),
        ((qkv[0], *arrays[1:]), {}, "or partial sums of that"),
        (arrays, {"q_dtype": jnp.int8}, "q_dtype is int8"),
        (arrays, {"sin": None}, "go together"),
        (arrays, {"cos": jnp.ones((3, 17)), "sin": jnp.ones((3, 17))}, "at most the head size 32"),
        (arrays, {"q_norm": jnp.ones(16)}, "q_norm"),
        (arrays, {"key_scales": scales}, "take no key_scales"),
        ((qkv, codes, codes, page, offset), {"key_scales": scales}, "need value_scales"),
        ((qkv, codes, codes, page, offset), {"key_scales": scales[:1], "value_scales": scales}, "key_scales is"),
        ((qkv, codes.astype(jnp.int32), codes.astype(jnp.int32), page, offset), {}, "pages are int32; they can be"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*changed, **options | more)


def test_choice_of_backend(rng):
    """An H200 gets the kernel, but for a few pools whose offsets overflow; a T4 gets XLA and one warning."""

    def lowered(kind, num_pages, page_dtype, implementation=None, shape=SHAPES["llama-3.1-8b"]):
        arrays, options = arguments(shape, 8, page_dtype=page_dtype, num_pages=num_pages)
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device)):
            traced = jax.jit(functools.partial(rotary_page_write, implementation=implementation)).trace(
                *arrays, **{name: x for name, x in options.items() if name != "interleaved"}
            )
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    kernel = "__gpu$xla.gpu.triton"
    gib = 2**30 // (8 * 64 * 128)  # pages of a GiB of bytes
    for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"):
        assert kernel in lowered(kind, 512, "float8_e4m3fn")
    assert kernel in lowered("NVIDIA H200", 2 * gib, "int8")
    assert kernel in lowered("NVIDIA H200", 3 * gib, "int8")
    cut = SHAPES["llama-3.1-8b"]._replace(half=27)
    assert kernel not in lowered("NVIDIA H200", 3 * gib, "int8", shape=cut)
    assert kernel in lowered("NVIDIA H200", 5 * gib, "int8")
    assert kernel in lowered("NVIDIA H200", 3 * gib, "bfloat16")
    with pytest.raises(dispatch.UnsupportedError, match="3.00 GiB in int8 is written in words"):
        lowered("NVIDIA H200", 3 * gib, "int8", "triton", shape=cut)
    with pytest.warns(UserWarning, match="older than compute capability 8.0"):
        dispatch._say_once.cache_clear()
        assert kernel not in lowered("Tesla T4", 512, "int8")


def compiled(shape, tokens, target, implementation=None, parts=None, dump_to=None, **kinds):
    """The op compiled with its pages donated, and how many bytes those have."""
    arrays, options = arguments(shape, tokens, **kinds)
    q_dtype = arrays[0].dtype
    if parts is not None:
        arrays[0] = jax.ShapeDtypeStruct((parts, *arrays[0].shape), jnp.float32)
    names = [name for name in ("key_scales", "value_scales") if options[name] is not None]
    pools = [*arrays[1:3], *(options.pop(name) for name in names)]

    def step(pools, qkv, page, offset, angle, weight):
        scales = dict(zip(names, pools[2:], strict=True))
        cos, sin = angle
        return rotary_page_write(
            qkv, *pools[:2], page, offset, cos=cos, sin=sin, interleaved=shape.interleaved, q_norm=weight,
            k_norm=weight, q_dtype=q_dtype, implementation=implementation, **scales
        )  # fmt: skip

    rest = arrays[0], *arrays[3:], (options["cos"], options["sin"]), options["q_norm"]
    nbytes = [pool.size * pool.dtype.itemsize for pool in pools]
    return compile_for(step, pools, *rest, target=target, donate_argnums=0, dump_to=dump_to), nbytes


@pytest.mark.parametrize(
    "name, tokens, kinds",
    [
        ("llama-3.1-8b", 32, {}),
        ("qwen3-0.6b", 8192, {"page_dtype": "int8"}),
        ("phi-2", 64, {"page_dtype": "float8_e4m3fn"}),
        ("gpt-j-6b", 1, {"dtype": jnp.float16, "page_dtype": "float8_e5m2"}),
        ("smollm2-135m", 256, {"dtype": jnp.float32}),
        ("llama-3.3-70b", 64, {"parts": 4}),
        ("llama-3.1-8b", 32, {"page_dtype": "float8_e4m3fn", "num_pages": 48_000}),  # 2.9 GiB
    ],
)
@pytest.mark.parametrize("target", ["a100", "l4", "h200", "b200"])
def test_one_launch_in_place(name, tokens, kinds, target, gpu_compiler, tmp_path):
    program, nbytes = compiled(SHAPES[name], tokens, target, dump_to=tmp_path, **kinds)
    assert memory(program).alias == sum(nbytes)
    assert memory(program).temporaries < 64  # a few pointers
    assert large_copies(program, min(nbytes)) == []
    free = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant")
    assert [each.opcode for each in entry_instructions(program) if each.opcode not in free] == ["custom-call"]
    assert read_resources(program, tmp_path)[triton.OP].spill_bytes == 0


@pytest.mark.parametrize("target", [None, "a100", "h200"])
@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8"])
def test_xla_is_in_place(target, page_dtype, request):
    if target is not None:
        request.getfixturevalue("gpu_compiler")
        program, nbytes = compiled(SHAPES["llama-3.2-1b"], 64, target, "xla", page_dtype=page_dtype)
    else:
        arrays, options = arguments(SHAPES["llama-3.2-1b"], 64, page_dtype=page_dtype)
        scales = {name: options.pop(name) for name in ("key_scales", "value_scales") if page_dtype == "int8"}
        nbytes = [x.size * x.dtype.itemsize for x in (*arrays[1:3], *scales.values())]
        step = jax.jit(functools.partial(rotary_page_write, interleaved=False), donate_argnames=[
            "key_pages", "value_pages", *scales
        ])  # fmt: skip
        options = {name: options[name] for name in ("cos", "sin")}
        program = step.lower(*arrays, **options, **scales).compile()
    assert memory(program).alias == sum(nbytes)
    assert large_copies(program, nbytes[0]) == []


def test_a_lost_donation_is_seen(gpu_compiler):
    """The checks can fail: pages that are not donated are copied."""
    arrays, options = arguments(SHAPES["llama-3.1-8b"], 8)
    options.pop("interleaved")
    program = compile_for(rotary_page_write, *arrays, **options, target=targets.H200)
    assert memory(program).alias == 0
    assert len(large_copies(program, arrays[1].size * 2)) == 2
