"""What else computes the same on an NVIDIA GPU, each as a contender of `bench.timing`.

A rival takes the problem and raises what it raises where it can not run: the library is missing, it does not know the
GPU, it has no such feature. The benchmark records the reason. Each runs in its own best layout, with its defaults.
"""

import functools
import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from bench.problems import Attention, Dense, Matmul, Norm, Threshold, random_array
from bench.timing import Contender, captured, chained, replace, rotations


class NotCovered(ValueError):
    """The rival has no form for this problem."""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _randn(*shape: int, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, device=_device(), dtype=dtype or torch.bfloat16)


def _attention_calls(problem: Attention | Dense) -> tuple[int, int | None]:
    """Copies that the calls of a program rotate over, and its calls: one where a call is long."""
    if isinstance(problem, Attention) and problem.decodes:
        return rotations(problem.kv_bytes), None
    return 1, 1


def _dense_form(problem: Attention | Dense) -> tuple[int, int, int, bool]:
    """Rows, queries, keys, and whether causal in the sense in which query 0 sees key 0 alone."""
    if isinstance(problem, Dense):
        return problem.batch, problem.length, problem.length, problem.causal
    if problem.is_quantized:
        raise NotCovered("its keys and values are not quantized")
    slots, queries, keys = problem.dense_shape
    if queries not in (1, keys):
        raise NotCovered("its causal mask is only for queries and keys of the same number")
    return slots, queries, keys, queries > 1


def torch_sdpa(problem: Attention | Dense, backend: str) -> Contender:
    """The scaled_dot_product_attention of torch: `FLASH_ATTENTION` (FlashAttention-2 class) or `CUDNN_ATTENTION`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, queries, keys, causal = _dense_form(problem)
    rotation, calls = _attention_calls(problem)
    q = _randn(rows, problem.heads, queries, problem.head_dim)
    pairs = [[_randn(rows, problem.kv_heads, keys, problem.head_dim) for _ in "kv"] for _ in range(rotation)]

    def call(i: int) -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, *pairs[i], is_causal=causal, enable_gqa=True)

    return captured(call, rotation, calls)


def torch_flex(problem: Attention | Dense) -> Contender:
    """The flex attention of torch, compiled."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, queries, keys, causal = _dense_form(problem)
    rotation, calls = _attention_calls(problem)
    q = _randn(rows, problem.heads, queries, problem.head_dim)
    pairs = [[_randn(rows, problem.kv_heads, keys, problem.head_dim) for _ in "kv"] for _ in range(rotation)]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, queries, keys, device=_device())
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(i: int) -> None:
        with torch.no_grad():
            compiled(q, *pairs[i], block_mask=mask, enable_gqa=True)

    return captured(call, rotation, calls)


def jax_cudnn(problem: Attention | Dense) -> Contender:
    """Attention of cuDNN through `jax.nn.dot_product_attention`."""
    rows, queries, keys, causal = _dense_form(problem)
    rotation, calls = _attention_calls(problem)
    q = random_array(0, (rows, queries, problem.heads, problem.head_dim), jnp.bfloat16)
    shape = (rows, keys, problem.kv_heads, problem.head_dim)
    pairs = [tuple(random_array(2 * i + j, shape, jnp.bfloat16) for j in (1, 2)) for i in range(rotation)]

    def call(q, _, pair):
        return jax.nn.dot_product_attention(q, *pair, is_causal=causal, implementation="cudnn")

    return chained(call, q, None, pairs, follow=replace, calls=calls)


def jax_paged(problem: Attention) -> Contender:
    """JAX's own kernel for paged decode, in Pallas-Triton."""
    paged_attention = _jax_op("paged_attention").paged_attention
    if not problem.decodes:
        raise NotCovered("it only decodes")
    if problem.is_quantized:
        raise NotCovered("not tried with quantized pages")
    q, shared, tables = problem.arrays()
    pools = [shared[name].swapaxes(0, 1).copy() for name in ("key_pages", "value_pages")]
    columns = tables[0].shape[1]
    splits = next((n for n in (16, 8, 4, 2, 1) if columns % n == 0), 1)
    pages_per_block = next(n for n in (8, 4, 2, 1) if columns // splits % n == 0)

    def call(q, constants, table):
        pools, lengths = constants
        table = jnp.minimum(table, pools[0].shape[1] - 1)
        return paged_attention(
            q * problem.head_dim**-0.5, *pools, table, lengths, k_splits=splits, pages_per_compute_block=pages_per_block
        )

    return chained(call, q, (pools, shared["kv_lens"]), tables, follow=replace)


def jax_dense_decode(problem: Attention) -> Contender:
    """JAX's own split-K decode over dense keys, in Pallas-Triton."""
    gqa = _jax_op("decode_attention").gqa
    rows, queries, keys, _ = _dense_form(problem)
    if queries > 1:
        raise NotCovered("it only decodes")
    q = random_array(0, (rows, problem.heads, problem.head_dim), jnp.bfloat16)
    shape = (rows, keys, problem.kv_heads, problem.head_dim)
    count = rotations(problem.kv_bytes)
    pairs = [tuple(random_array(2 * i + j, shape, jnp.bfloat16) for j in (1, 2)) for i in range(count)]
    return chained(lambda q, _, pair: gqa(q, *pair), q, None, pairs, follow=replace)


def jax_mosaic(problem: Attention | Dense) -> Contender:
    """JAX's own Hopper attention, in Pallas-Mosaic-GPU; float16, the dtype that its buffers have."""
    op = _jax_op("attention_mgpu")
    rows, queries, keys, causal = _dense_form(problem)
    if queries == 1:
        raise NotCovered("it is for prompts")
    q = random_array(0, (rows, queries, problem.heads, problem.head_dim), jnp.float16)
    shape = (rows, keys, problem.kv_heads, problem.head_dim)
    pair = tuple(random_array(j, shape, jnp.float16) for j in (1, 2))
    config = op.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2 if problem.head_dim > 64 else 4, causal=causal
    )
    contender = chained(lambda q, _, pair: op.attention(q, *pair, config), q, None, [pair], calls=1)
    contender.notes.append("without the scale of the scores, which it does not have; float16")
    return contender


def _jax_op(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is a rival as long as it is shipped
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


def flashinfer(problem: Attention) -> Contender:
    """FlashInfer's paged decode, or its prefill of one prompt."""
    import flashinfer  # pyright: ignore[reportMissingImports]
    import torch

    shape = (problem.heads, problem.kv_heads, problem.head_dim)
    if not problem.decodes:
        slots, _, keys, _ = _dense_form(problem)
        if slots > 1:
            raise NotCovered("tried with one prompt only")
        q, k, v = (_randn(keys, n, problem.head_dim) for n in (problem.heads, problem.kv_heads, problem.kv_heads))
        return captured(lambda _: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True), 1, calls=1)
    if problem.is_quantized:
        raise NotCovered("not tried with quantized pages")
    size = problem.page_size
    counts: Any = torch.tensor([-(-kv // size) for kv in problem.kv_lens], dtype=torch.int32)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().cuda()
    last = torch.tensor([(kv - 1) % size + 1 for kv in problem.kv_lens], dtype=torch.int32).cuda()
    rotation, total = rotations(problem.kv_bytes), int(counts.sum())
    order = torch.randperm(total * rotation, device="cuda", dtype=torch.int32).reshape(rotation, total)
    pools = tuple(_randn(total * rotation, problem.kv_heads, size, problem.head_dim) for _ in "kv")
    q = _randn(len(counts), problem.heads, problem.head_dim)
    wrappers: list[Any] = []
    for indices in order:
        workspace = torch.empty(2**27, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(starts, indices, last, *shape, size, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        wrappers.append(wrapper)
    return captured(lambda i: wrappers[i].run(q, pools), rotation)


def torch_norm(problem: Norm) -> Contender:
    """A sum and the rms_norm of torch."""
    import torch

    x, scale = _randn(problem.rows, problem.width), _randn(problem.width)
    parts = [_randn(problem.parts, problem.rows, problem.width, dtype=torch.float32)] if problem.parts else []
    update = _randn(problem.rows, problem.width)

    def call(_: int) -> None:
        total = x + (parts[0].sum(0).to(x.dtype) if parts else update)
        torch.nn.functional.rms_norm(total, (problem.width,), scale, 1e-5)

    return captured(call, 1)


def torch_linear(problem: Matmul) -> Contender:
    """The linear of torch; with its activation and product where the problem has them."""
    import torch

    out, inner, activation, _ = problem.product
    rotation = rotations(2 * out * inner)
    x, weights = _randn(problem.rows, inner), [_randn(out, inner) for _ in range(rotation)]

    def call(i: int) -> None:
        with torch.no_grad():
            result = torch.nn.functional.linear(x, weights[i])
            if activation:
                gate, up = result.chunk(2, dim=-1)
                torch.mul(torch.nn.functional.silu(gate), up)

    return captured(call, rotation)


def torch_sort(problem: Threshold) -> Contender:
    """Top-p the usual way: sort the vocabulary, add up, cut."""
    import torch

    logits = _randn(problem.rows, problem.vocab, dtype=torch.float32)

    def call(_: int) -> None:
        ordered, _order = torch.sort(logits, dim=-1, descending=True)
        mass = torch.softmax(ordered, -1).cumsum(-1)
        torch.where(mass < problem.top_p, ordered, torch.inf).amin(-1)

    return captured(call, 1)


ATTENTION = {
    "torch flash": functools.partial(torch_sdpa, backend="FLASH_ATTENTION"),
    "torch cuDNN": functools.partial(torch_sdpa, backend="CUDNN_ATTENTION"),
    "torch flex": torch_flex,
    "JAX cuDNN": jax_cudnn,
}
DECODE = ATTENTION | {"JAX paged_attention": jax_paged, "JAX decode_attention": jax_dense_decode}
PREFILL = ATTENTION | {"JAX attention_mgpu": jax_mosaic}
PAGED = {"FlashInfer": flashinfer}
