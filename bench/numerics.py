"""Every kernel on this GPU against exact arithmetic on the host: largest errors, and whether they are what they may be.

The bound is that of the tests: root mean square and largest error at most 1.1 times those of a plain implementation in
the same precision, both measured against float64, with room for one rounding. Ops that compute in float32 and round
once must be within one unit in the last place. The oracle of attention is the tests' own, so a checkout is needed, not
an installed package.
"""

import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.quantization import quantize_array
from pallas_kernels.add_norm import add_norm
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dispatch import current_gpu
from pallas_kernels.few_row_matmul import few_row_matmul
from pallas_kernels.grouped_matmul import QuantizedExperts, Routing, choose_experts, grouped_matmul, plan_experts
from pallas_kernels.quantized_matmul import ELEMENTS, dequantize, quantized_matmul, to_tiles
from pallas_kernels.quantized_matmul.shapes import FORMATS
from pallas_kernels.ragged_paged_attention import cascade_attention, ragged_paged_attention, shared_prefixes
from pallas_kernels.ragged_paged_attention.shapes import DEEPSPEED
from pallas_kernels.rotary_page_write import rotary_page_write
from pallas_kernels.rotary_page_write.shapes import SHAPES, Shape, arguments
from pallas_kernels.sampling_threshold import sampling_threshold

TRITON = "__gpu$xla.gpu.triton"
SINGLE = float(np.finfo(np.float32).eps)


@functools.cache
def _oracle() -> Any:
    folder = pathlib.Path(__file__).parents[1] / "tests" / "pallas_kernels"
    sys.path.append(str(folder))
    return importlib.import_module("attention_oracle")


def errors(out: Any, exact: np.ndarray, plain: np.ndarray, dtype: Any, factor: float = 1.1) -> dict[str, Any]:
    """Errors of a result and of a plain implementation against float64, and whether the first are allowed.

    Args:
        out: the result, in `dtype`.
        exact: what it should be.
        plain: what plain code in the same precision gives.
        dtype: which one rounding more is forgiven in.
        factor: how many times the error of plain code is allowed.
    """
    out, plain = (np.asarray(each, np.float64) for each in (out, plain))
    finite = np.isfinite(exact)
    scale = np.abs(exact[finite]).max(initial=0)
    ulp = float(jnp.finfo(dtype).eps) * scale
    mine, allowed = (np.where(finite, each - np.where(finite, exact, 0), 0) for each in (out, plain))
    found: dict[str, Any] = {
        "max": float(np.abs(mine).max()),
        "rms": float(np.sqrt((mine**2).mean())),
        "plain_max": float(np.abs(allowed).max()),
        "plain_rms": float(np.sqrt((allowed**2).mean())),
        "scale": float(scale),
    }
    found["passed"] = bool(
        found["rms"] <= factor * found["plain_rms"] + 2 * SINGLE * scale
        and found["max"] <= factor * found["plain_max"] + 16 * SINGLE * scale + ulp / 2
        and np.array_equal(out[~finite], exact[~finite])
    )
    return found


def rounded_once(out: Any, exact: np.ndarray) -> dict[str, Any]:
    """How a result differs from float32 arithmetic that is rounded once: at most one unit in the last place."""
    info = jnp.finfo(out.dtype)
    out, exact = np.asarray(out, np.float64), np.asarray(exact, np.float64)
    difference = np.abs(out - exact)
    allowed = float(info.eps) * np.abs(exact) + 8 * SINGLE * np.abs(exact).max() + float(info.tiny)
    return {
        "max": float(difference.max()),
        "scale": float(np.abs(exact).max()),
        "passed": bool((difference <= allowed).all()),
    }


MIXED = ((332, 628), (1, 718), (1, 323), (180, 5), (224, 0), (0, 77))
DECODE = tuple((1, seen) for seen in (0, 33, 127, 128, 1000, 2047, 5, 700))


def _variants() -> dict[str, dict[str, Any]]:
    base: dict[str, Any] = {"shape": (32, 8, 128), "batch": MIXED, "page_size": 64, "dtype": "bfloat16"}
    decode = base | {"batch": DECODE, "options": {"max_q_len": 1}}
    found = {"mixed": base, "decode": decode}
    for name in ("prompt-2037", "prompt-2", "prompts-83-312-610", "continuation-332-628", "mixed-gqa-40-8"):
        each = DEEPSPEED[name]
        shape = (each.attention.heads, each.attention.kv_heads, each.attention.head_dim)
        found[name] = base | {"shape": shape, "batch": each.new_and_seen, "page_size": each.page_size}
    for name, options in (
        ("window", {"window": 100}),
        ("soft cap", {"soft_cap": 20.0}),
        ("both ways", {"causal": False}),
        ("both ways, window", {"causal": False, "window": 70}),
        ("window, soft cap", {"window": 300, "soft_cap": 30.0}),
    ):
        found[name] = base | {"options": options}
    for feature in ("alibi", "sinks", "kv_starts"):
        found[feature] = base | {"features": (feature,)}
        found[f"decode, {feature}"] = decode | {"features": (feature,)}
    found["decode, window"] = decode | {"options": {"max_q_len": 1, "window": 100}}
    for stored in ("int8", "float8_e4m3fn", "float8_e5m2"):
        found[stored] = base | {"stored": stored}
        found[f"decode, {stored}"] = decode | {"stored": stored}
    for size in (16, 32, 128):
        found[f"pages of {size}"] = base | {"page_size": size}
        found[f"decode, pages of {size}"] = decode | {"page_size": size}
    for shape in ((16, 8, 64), (16, 8, 80), (32, 32, 96), (16, 8, 256), (71, 1, 64), (9, 3, 64), (4, 4, 16)):
        found["heads {}/{} of {}".format(*shape)] = base | {"shape": shape}
        found["decode, heads {}/{} of {}".format(*shape)] = decode | {"shape": shape}
    for dtype in ("float16", "float32"):
        found[dtype] = base | {"dtype": dtype}
        found[f"decode, {dtype}"] = decode | {"dtype": dtype}
    return found


VARIANTS = _variants()


def _tiny(variant: dict[str, Any]) -> dict[str, Any]:
    batch = tuple((min(new, 5), min(seen, 20)) for new, seen in variant["batch"][:3])
    return variant | {"shape": (4, 2, 16), "batch": batch, "page_size": 16}


@functools.lru_cache(2)
def _batch(name: str, tiny: bool) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """A batch, what it should give, and the options of the call."""
    oracle, variant = _oracle(), VARIANTS[name]
    variant = _tiny(variant) if tiny else variant
    new, seen = (np.array(each) for each in zip(*variant["batch"], strict=True))
    batch = oracle.make_batch(
        np.random.default_rng(0),
        variant["shape"],
        new,
        new + seen,
        page_size=variant["page_size"],
        dtype=jnp.dtype(variant["dtype"]),
        stored=jnp.dtype(variant["stored"]) if "stored" in variant else None,
        features=variant.get("features", ()),
    )
    options = variant.get("options", {})
    return batch, oracle.answers(batch, **{k: v for k, v in options.items() if k != "max_q_len"}), options


def attention(variant: str, implementation: str, tiny: bool = False) -> dict[str, Any]:
    batch, ((exact, exact_lse), (plain, plain_lse)), options = _batch(variant, tiny)
    call = functools.partial(ragged_paged_attention, return_lse=True, implementation=implementation, **options)
    out, lse = jax.jit(call)(**batch)
    tokens = int(batch["cu_q_lens"][-1])
    return {
        "out": errors(out[:tokens], exact[:tokens], plain[:tokens], batch["q"].dtype),
        "lse": errors(lse, exact_lse, plain_lse, np.float32),
    }


def cascade(implementation: str, tiny: bool = False) -> dict[str, Any]:
    """Sixteen slots that share three quarters of their keys; both parts are rounded, so twice the error is allowed."""
    oracle, page_size = _oracle(), 16
    slots, length = (3, 40) if tiny else (16, 1000)
    shape = (4, 2, 16) if tiny else (32, 8, 128)
    lengths = np.full(slots, length)
    batch = oracle.make_batch(
        np.random.default_rng(0), shape, lengths * 0 + 1, lengths, page_size=page_size, dtype=jnp.bfloat16
    )
    common = 3 * length // 4 // page_size
    table = np.array(batch["page_table"])
    table[:, :common] = table[0, :common]
    batch["page_table"] = jnp.asarray(table)

    def call(batch):
        found = shared_prefixes(batch["page_table"], batch["cu_q_lens"], batch["kv_lens"], page_size)
        return cascade_attention(**batch, shared=found, max_q_len=1, implementation=implementation)

    (exact, _), (plain, _) = oracle.answers(batch)
    return {"out": errors(jax.jit(call)(batch), exact, plain, jnp.bfloat16, factor=2.0)}


def _host() -> Any:
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def rotary(model: str, page_dtype: str, implementation: str, tiny: bool = False) -> dict[str, Any]:
    """Against the reference in float32 on the host: queries and plain pages to a rounding, codes to one step."""
    rng, tokens = np.random.default_rng(0), 5 if tiny else 200
    shape = Shape(4, 2, 16, 8) if tiny else SHAPES[model]
    abstract, options = arguments(shape, tokens, jnp.bfloat16, jnp.dtype(page_dtype), 2 + tokens // 16, 16)
    places = rng.permutation(abstract[1].shape[0] * 16)[:tokens]

    def random(struct):
        return jnp.asarray(rng.normal(size=struct.shape) * (8 if struct.dtype.itemsize == 1 else 1), struct.dtype)

    def call(implementation):
        rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
        arrays = [random(each) for each in abstract[:3]]
        arrays += [jnp.asarray(each, jnp.int32) for each in (places // 16, places % 16)]
        given = {k: random(v) if isinstance(v, jax.ShapeDtypeStruct) else v for k, v in options.items()}
        if given["cos"] is not None:
            given |= {"cos": jnp.cos(given["cos"]), "sin": jnp.sin(given["cos"])}
        run = jax.jit(rotary_page_write, static_argnames=("interleaved", "implementation"))
        return run(*arrays, **given, implementation=implementation)

    with _host():
        wanted = call("reference")
    got = call(implementation)
    found = {"q": rounded_once(got.q, np.asarray(wanted.q, np.float64))}
    for name in ("key_pages", "value_pages", "key_scales", "value_scales"):
        new, old = getattr(got, name), getattr(wanted, name)
        if new is None:
            continue
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        finite = np.isfinite(old)
        step = {"int8": 1.0, "float8_e4m3fn": 2.0**-3, "float8_e5m2": 2.0**-2}.get(page_dtype, 2.0**-7)
        allowed = step * (1 if page_dtype == "int8" else np.abs(old)) + 1e-6
        difference = np.where(finite, np.abs(new - np.where(finite, old, 0)), 0)
        found[name] = {
            "max": float(difference.max()),
            "different": float((difference > 0).mean()),
            "passed": bool((difference <= np.where(finite, allowed, 0)).all()),
        }
    return found


def norm(
    rows: int, width: int, parts: int, implementation: str, both: bool = False, tiny: bool = False
) -> dict[str, Any]:
    """A residual with RMS norm; with `both`, an RMS norm of the update and a LayerNorm of the sum."""
    rng = np.random.default_rng(0)
    rows, width = (2, 48) if tiny else (rows, width)
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)
    scale, bias, update_scale = (jnp.asarray(rng.normal(size=width), jnp.bfloat16) for _ in range(3))
    update = rng.normal(size=(parts, rows, width) if parts else (rows, width))
    update = jnp.asarray(update, jnp.float32 if parts else jnp.bfloat16)
    run = functools.partial(add_norm, eps=1e-5, implementation=implementation)
    if both:
        run = functools.partial(run, kind="layer", update_kind="rms", offset=1.0, multiplier=0.5)
        total, normed = jax.jit(run)(x, update, scale, bias, update_scale=update_scale)
    else:
        total, normed = jax.jit(run)(x, update, scale)

    def rms(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    wide = {"x": x, "update": update, "scale": scale, "bias": bias, "update_scale": update_scale, "stored": total}
    wide = {name: np.asarray(each, np.float64) for name, each in wide.items()}
    added, stored = wide["update"].reshape(-1, rows, width).sum(0), wide["stored"]
    if both:
        added = 0.5 * rms(added) * (1 + wide["update_scale"])
        of_stored = rms(stored - stored.mean(-1, keepdims=True)) * (1 + wide["scale"]) + wide["bias"]
    else:
        of_stored = rms(stored) * wide["scale"]
    return {"sum": rounded_once(total, wide["x"] + added), "norm": rounded_once(normed, of_stored)}


def matmul(rows: int, out: int, inner: int, activation: str | None, partial: bool, dtype: str, implementation: str):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, inner)), dtype)
    weight = jnp.asarray(rng.normal(size=(out, inner)) * inner**-0.5, dtype)
    options = {"activation": activation, "partial": partial, "implementation": implementation}
    found = jax.jit(functools.partial(few_row_matmul, **options))(x, weight)

    def product(precision):
        full = np.asarray(x, precision) @ np.asarray(weight, precision).T
        if activation is None:
            return full
        gate, up = np.split(full, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up

    exact, plain = product(np.float64), product(np.float32)
    if partial:
        return {"out": errors(np.asarray(found, np.float64).sum(0), exact, plain, np.float32)}
    return {"out": errors(found, exact, plain.astype(jnp.dtype(dtype)), dtype)}


def quantized(name: str, rows: int, extra: str, activation: str | None, tiny: bool = False) -> dict[str, Any]:
    """A product with random codes in tiles against its weight dequantized on the host."""
    rng, (out, inner) = np.random.default_rng(0), (64, 256) if tiny else (1040, 2048)
    format, scale_dtype = FORMATS[name]
    stored = ELEMENTS[format.element]
    values = rng.integers(0, 256, (out, inner * stored.bits // 8)).astype(np.uint8)
    if format.element == "e4m3":
        values[values & 127 == 127] = 0  # NaN
    shape = format.scales_shape(out, inner)
    scales = rng.integers(118, 124, shape) if scale_dtype == "uint8" else rng.uniform(0.01, 0.02, shape)
    arrays: list[Any] = [jnp.asarray(values.view(stored.dtype)), jnp.asarray(scales, scale_dtype), None, None]
    if "zeros" in extra:
        arrays[2] = jnp.asarray(rng.integers(0, 16, shape), jnp.uint8 if extra == "zeros" else jnp.float32)
    if extra == "minimums":
        arrays[3] = jnp.asarray(rng.normal(size=shape) / 10, jnp.float16)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.bfloat16)
    *tiled, layout = to_tiles(*arrays, format=format)
    run = functools.partial(quantized_matmul, format=layout, activation=activation, partial=activation is None)
    found = jax.jit(functools.partial(run, implementation="triton"))(x, *tiled)
    with _host():
        on_host: list[Any] = [None if each is None else jnp.asarray(np.asarray(each)) for each in arrays]
        weight = dequantize(*on_host, format=format)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    if activation is not None:
        gate, up = np.split(exact, 2, axis=-1)
        return {
            "out": errors(found, exact := gate / (1 + np.exp(-gate)) * up, exact.astype(jnp.bfloat16), jnp.bfloat16)
        }
    error = np.asarray(found, np.float64).sum(0) - exact
    relative = float(np.sqrt(np.mean(error**2) / np.mean(exact**2)))
    # Where it rounds weights to bfloat16, and its table of nf4.
    return {"out": {"max": relative, "passed": relative < 3e-3}}


def routing(name: str, tiny: bool = False) -> dict[str, Any]:
    """The kernel's choice of experts against plain JAX on the host; logits are in parts, as a product leaves them."""
    rng, (tokens, count) = np.random.default_rng(0), (5, 16) if tiny else (200, 256)
    logits = rng.normal(size=(2, tokens, count)).astype(np.float32)
    correction = jnp.asarray(rng.normal(size=count) / 10, jnp.float32) if name == "groups" else None
    options = Routing(8, "sigmoid", 8, 4, "top2", scale=2.5) if name == "groups" else Routing(8)
    run = functools.partial(choose_experts, routing=options)
    with _host():
        wanted, chosen = run(jnp.asarray(logits), correction=correction, implementation="xla")
    weights, found = jax.jit(functools.partial(run, implementation="triton"))(logits, correction=correction)
    error = np.abs(np.asarray(weights, np.float64) - np.asarray(wanted, np.float64)).max()
    same = np.array_equal(found, chosen)
    return {"weights": {"max": float(error), "same experts": same, "passed": same and bool(error < 1e-5)}}


def experts(scheme: str | None, tokens: int, tiny: bool = False) -> dict[str, Any]:
    """A layer of experts, its plan included, against loops on the host; some tokens have fewer experts than others."""
    rng, (count, choices) = np.random.default_rng(0), (4, 2) if tiny else (16, 4)
    width, size = (128, 128) if tiny else (1024, 512)
    shapes = ((count, 2 * size, width), (count, width, size))
    weights = [jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.bfloat16) for shape in shapes]
    given, exact = weights, [np.asarray(each, np.float64) for each in weights]
    if scheme is not None:
        leaves = [quantize_array(each, scheme) for each in weights]
        exact = [np.asarray(leaf.dequantize(jnp.float32), np.float64) for leaf in leaves]
        given = []
        for leaf in (each.tiled() for each in leaves):
            parts = leaf.values, leaf.scales, leaf.zeros, leaf.minimums, leaf.tensor_scale
            given.append(QuantizedExperts(*parts, leaf.format))
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    chosen = np.argsort(rng.random((tokens, count)), axis=1)[:, :choices]
    chosen[:: max(2, tokens // 8), 0] = -1
    share = rng.random((tokens, choices)).astype(np.float32)

    @jax.jit
    def layer(x, weights, chosen, share):
        plan = plan_experts(chosen, count, implementation="triton")
        run = functools.partial(grouped_matmul, plan=plan, implementation="triton")
        hidden = run(x, weights[0], gather=True, activation="silu")
        return run(hidden, weights[1], scatter=True, scale=share, dtype=jnp.float32).sum(axis=0)

    def loops(precision: Any, stored: Any) -> np.ndarray:
        out = np.zeros((tokens, width), precision)
        for expert in range(count):
            token, place = np.nonzero(chosen == expert)
            product = np.asarray(x, precision)[token] @ exact[0][expert].astype(precision).T
            gate, up = np.split(product, 2, axis=-1)
            hidden = (gate / (1 + np.exp(-gate)) * up).astype(stored).astype(precision)
            product = hidden @ exact[1][expert].astype(precision).T
            np.add.at(out, token, product * share[token, place][:, None].astype(precision))
        return out

    found = layer(x, given, jnp.asarray(chosen, jnp.int32), share)
    wanted = loops(np.float64, np.float64)
    if scheme is None:
        return {"out": errors(found, wanted, loops(np.float32, jnp.bfloat16), np.float32)}
    relative = float(np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2) / np.mean(wanted**2)))
    # Weights rounded to bfloat16 where it scales them, and what is between the products.
    return {"out": {"max": relative, "passed": relative < 4e-3}}


def threshold(vocab: int, implementation: str, tiny: bool = False) -> dict[str, Any]:
    """Against the reference on the host: what differs in being kept must weigh next to nothing."""
    vocab = 60 if tiny else vocab
    logits = np.random.default_rng(0).normal(size=(8, vocab)).astype(np.float32) * 4
    top_k = jnp.asarray([0, 1, 40, 2 * vocab, 0, 0, 50, 0], jnp.int32)
    top_p = jnp.asarray([1, 1, 1, 1, 0.9, 0, 0.7, 0.999], jnp.float32)
    min_p = jnp.asarray([0, 0, 0, 0, 0, 0, 0.05, 0.1], jnp.float32)
    run = jax.jit(sampling_threshold, static_argnames="implementation")
    with _host():
        wanted = np.asarray(run(*map(np.asarray, (logits, top_k, top_p, min_p)), implementation="reference"))
    got = np.asarray(run(jnp.asarray(logits), top_k, top_p, min_p, implementation=implementation))
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    moved = (weight * ((logits >= wanted[:, None]) != (logits >= got[:, None]))).sum(-1) / weight.sum(-1)
    return {"kept": {"max": float(moved.max()), "passed": bool(moved.max() < 1e-5)}}


def dense(implementation: str, tiny: bool = False, **options: Any) -> dict[str, Any]:
    rng, (length, heads, head_dim) = np.random.default_rng(0), (9, 2, 16) if tiny else (300, 8, 128)
    shapes = [(2, length, n, head_dim) for n in (2 * heads, heads, heads)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    lengths = jnp.asarray([length, length // 2], jnp.int32)
    got = jax.jit(functools.partial(dense_attention, lengths=lengths, implementation=implementation, **options))(
        q, k, v
    )
    with _host():
        host = [jax.device_put(np.asarray(each)) for each in (q, k, v)]
        wide = [each.astype(jnp.float32) for each in host]
        real = jnp.asarray(np.asarray(lengths))
        exact = dense_attention(*wide, lengths=real, implementation="reference", **options)
        plain = dense_attention(*host, lengths=real, implementation="xla", **options)
    return {"out": errors(got, np.asarray(exact, np.float64), np.asarray(plain, np.float64), jnp.bfloat16)}


def escape_hatch() -> dict[str, Any]:
    """A Triton kernel called by way of `jax.ffi`, without Pallas: the way out should Pallas drop its Triton backend."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)), jnp.bfloat16)
    run = jax.jit(functools.partial(add_norm, eps=1e-5, implementation="triton"))
    scale = jnp.ones(256, jnp.bfloat16)
    wanted = run(x, x, scale)
    got = jax.jit(by_ffi(run.lower(x, x, scale), wanted))(x, scale, x)
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(wanted, got, strict=True))
    return {"out": {"max": 0.0 if same else float("nan"), "passed": same}}


def by_ffi(lowered: jax.stages.Lowered, results: Any) -> Callable[..., Any]:
    """What calls the one Triton kernel of a lowered program directly, given its results' shapes."""
    call = next(_custom_calls(lowered.compiler_ir("stablehlo").operation))  # pyright: ignore[reportOptionalMemberAccess]
    config = call.attributes["mhlo.backend_config"]
    given: dict[str, Any] = {}
    for entry in config:
        value = entry.attr
        if entry.name == "ir":
            given["ir"] = value.value_bytes
        elif hasattr(value, "type") and "i32" in str(value.type):
            given[entry.name] = np.int32(value.value)
        else:
            given[entry.name] = value.value
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in results]

    def run(*arrays: jax.Array) -> Any:
        return jax.ffi.ffi_call(TRITON, shapes)(*arrays, **given)

    return run


def _custom_calls(operation: Any) -> Any:
    for region in operation.regions:
        for block in region:
            for each in block.operations:
                op = each.operation
                if op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == TRITON:
                    yield op
                yield from _custom_calls(op)


@functools.cache
def _checks(tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked, by name: Triton kernels first, then what is least tried, Mosaic and the library calls."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, check: Callable[..., Any], *args: Any, **options: Any) -> None:
        found[name] = functools.partial(check, *args, **options)

    backends = ["triton", "mosaic"] if current_gpu() is not None else ["triton"]
    first = ("mixed", "decode", "prompt-2037", "decode, int8")
    for backend in backends:
        for name in first:
            add(f"attention: {name} [{backend}]", attention, name, backend, tiny=tiny)
    for model, pages in (("llama-3.1-8b", "bfloat16"), ("qwen3-0.6b", "int8"), ("phi-2", "float8_e4m3fn")):
        add(f"rotary_page_write: {model}, {pages} [triton]", rotary, model, pages, "triton", tiny=tiny)
    for rows, width, parts in ((32, 4096, 4), (1, 576, 0), (300, 16384, 2)):
        add(f"add_norm: {rows} x {width}, {parts} parts [triton]", norm, rows, width, parts, "triton", tiny=tiny)
    for width in (2880, 16384):
        add(f"add_norm: 32 x {width}, of both [triton]", norm, 32, width, 4, "triton", both=True, tiny=tiny)
    add("sampling_threshold: 128256 [triton]", threshold, 128_256, "triton", tiny=tiny)
    size = (64, 64) if tiny else (6144, 4096)
    for rows, activation, partial, dtype in (
        (32, None, True, "bfloat16"),
        (1, None, False, "bfloat16"),
        (64, "silu", False, "bfloat16"),
        (17, "silu", False, "float16"),
        (3, None, True, "float32"),
    ):
        name = f"few_row_matmul: {rows} rows, {activation}, {'in parts, ' if partial else ''}{dtype} [triton]"
        add(name, matmul, rows, *size, activation, partial, dtype, "triton")
    kinds = [
        ("int4", 1, "", None),
        ("int4", 16, "zeros", None),
        ("q4_0", 64, "minimums", None),
        ("q4_0", 5, "floating zeros", None),
        ("int4", 32, "", "silu"),
        ("int4", 200, "", None),
        *((name, rows, "", None) for name in FORMATS for rows in (7, 64) if name != "int4"),
    ]
    for name, rows, extra, activation in kinds[: 2 if tiny else None]:
        title = f"quantized_matmul: {name}{extra and ' with '}{extra}, {rows} rows, {activation} [triton]"
        add(title, quantized, name, rows, extra, activation, tiny=tiny)
    for name in ("softmax", "groups"):
        add(f"choose_experts: {name} [triton]", routing, name, tiny=tiny)
    for scheme in (None, "int4") if tiny else (None, "int4", "int4_asym", "int8", "fp8", "fp6", "mxfp4", "nf4"):
        for tokens in (3,) if tiny else (1, 32, 300):
            title = f"grouped_matmul: {scheme or 'bfloat16'}, {tokens} tokens [triton]"
            add(title, experts, scheme, tokens, tiny=tiny)
    add("cascade_attention [triton]", cascade, "triton", tiny=tiny)
    implementations = ("cudnn", "xla") if current_gpu() is not None else ("xla",)
    for name in implementations:
        add(f"dense_attention: causal [{name}]", dense, name, tiny=tiny)
        add(f"dense_attention: both ways [{name}]", dense, name, tiny=tiny, causal=False)
    if current_gpu() is not None:
        add("escape hatch: a Triton kernel through jax.ffi", escape_hatch)
    if not tiny:
        for name in VARIANTS:
            for backend in backends:
                found.setdefault(f"attention: {name} [{backend}]", functools.partial(attention, name, backend))
        for model in SHAPES:
            title = f"rotary_page_write: {model}, bfloat16 [triton]"
            found.setdefault(title, functools.partial(rotary, model, "bfloat16", "triton"))
    return found


def units(tiny: bool = False) -> list[str]:
    """Names of all checks, those that matter most first; in a rehearsal one of each op."""
    names = list(_checks(tiny))
    ops = [name.split(":")[0] for name in names]
    return [name for i, name in enumerate(names) if not tiny or ops[i] not in ops[:i]]


def run_unit(name: str, tiny: bool = False) -> dict[str, Any]:
    """One check: for each result its errors, and whether all are allowed."""
    found = _checks(tiny)[name]()
    return {"errors": found, "passed": all(each["passed"] for each in found.values())}


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """A result in words."""
    worst = ", ".join(
        f"{part} {each['max']:.2e}" + (f" (plain {each['plain_max']:.2e})" if "plain_max" in each else "")
        for part, each in result["errors"].items()
    )
    return [f"{'ok  ' if result['passed'] else 'FAIL'} {name}: {worst}"]
