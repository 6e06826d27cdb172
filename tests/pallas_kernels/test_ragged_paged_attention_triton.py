"""What is special to the Triton kernels of ragged paged attention: their machine code, launches and block sizes."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import ragged_paged_attention, triton, triton_common, triton_pools
from pallas_kernels.ragged_paged_attention.blocks import num_query_blocks, query_blocks
from pallas_kernels.ragged_paged_attention.triton_prefill import Mask
from pallas_kernels.resources import kernel_resources
from pallas_kernels.targets import compile_for, entry_instructions, large_copies

# Minutes of compiling: two targets on the oldest JAX that is supported, one on the newest; the others only in part.
TARGETS = ("a100", "h200") if jax.__version_info__ < (0, 11) else ("h200",)
KERNELS = {"paged_decode", "paged_decode_merge", "paged_prefill"}
EVERYTHING = {"window": 1000, "soft_cap": 30.0, "features": ("alibi_slopes", "sinks", "kv_starts")}


def call(
    heads=(32, 8),
    head_dim=128,
    page_size=64,
    dtype=jnp.bfloat16,
    stored=None,
    features=(),
    tokens=512,
    slots=64,
    pages=1000,
    pages_per_slot=64,
    layers=1,
    **options,
):
    """Attention as a function of abstract arrays, and those arrays."""
    pool = jax.ShapeDtypeStruct((pages, heads[1], page_size, head_dim), stored or dtype)
    integers = {"page_table": (slots, pages_per_slot), "cu_q_lens": (slots + 1,), "kv_lens": (slots,)}
    arrays = {"q": jax.ShapeDtypeStruct((tokens, heads[0], head_dim), dtype), "key_pages": pool, "value_pages": pool}
    arrays |= {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in integers.items()}
    if stored is not None:
        scales = jax.ShapeDtypeStruct(pool.shape[:3], jnp.float32)
        arrays |= {"key_scales": scales, "value_scales": scales}
    for name in features:
        shape, kind = ((slots,), jnp.int32) if name == "kv_starts" else ((heads[0],), jnp.float32)
        arrays[name] = jax.ShapeDtypeStruct(shape, kind)

    def fn(arrays):
        for _ in range(layers):
            arrays = arrays | {"q": ragged_paged_attention(**arrays, implementation="triton", **options)}
        return arrays["q"]

    return fn, arrays


VARIANTS = {
    "d64": {"head_dim": 64, "heads": (9, 3), "features": ("sinks",), "window": 1000},
    "d80": {"head_dim": 80, "heads": (32, 32), "causal": False},
    "d96": {"head_dim": 96, "dtype": jnp.float16, "page_size": 16},
    "d128": {},
    "d128 with everything": EVERYTHING,
    "d256": {"head_dim": 256, "heads": (16, 8), "window": 4096, "soft_cap": 50.0},
    "group of 71": {"head_dim": 64, "heads": (71, 1)},
    "group of 7, long pages": {"heads": (28, 4), "page_size": 128, "features": ("sinks",)},
    "pool above 4 GiB": {"pages": 45_000},
    "int8": {"stored": jnp.int8, "page_size": 16},
    "int8 with everything": EVERYTHING | {"stored": jnp.int8},
    "int8, d64": {"stored": jnp.int8, "head_dim": 64, "heads": (64, 8), "window": 1000, "features": ("sinks",)},
    "fp8, pool of 3 GiB": {"stored": jnp.float8_e4m3fn, "pages": 48_000},
    "fp8, d80": {"stored": jnp.float8_e4m3fn, "dtype": jnp.float16, "head_dim": 80, "heads": (32, 32)},
    "fp8, d256": {"stored": jnp.float8_e5m2, "head_dim": 256},
    "float32": {"dtype": jnp.float32},
    "float32, d80": {"dtype": jnp.float32, "head_dim": 80, "page_size": 16},
    "float32 over int8": {"dtype": jnp.float32, "stored": jnp.int8},
}


CASES = [(variant, target) for variant in VARIANTS for target in TARGETS]
if "a100" in TARGETS:
    CASES += [(variant, target) for variant in ("int8 with everything", "fp8, d80") for target in ("l4", "b200")]


@pytest.mark.parametrize(("variant", "target"), CASES)
def test_machine_code(gpu_compiler, variant, target):
    """Every kernel compiles, spills no register, and all but those for float32 use tensor cores."""
    options = VARIANTS[variant]
    fn, arrays = call(slots=2, **options)  # so few that their keys are split
    found = kernel_resources(fn, arrays, target=target)
    assert set(found) == KERNELS
    assert {name: needs.spill_bytes for name, needs in found.items()} == dict.fromkeys(KERNELS, 0)
    for name in ("paged_decode", "paged_prefill"):
        uses_tensor_cores = bool(found[name].tensor_core_instructions)
        assert uses_tensor_cores == (options.get("dtype") != jnp.float32), "float32 is not to be rounded to TF32"
    if target == "h200" and options.get("dtype") != jnp.float32:
        assert found["paged_prefill"].tensor_core_instructions["wgmma"] > 0


@pytest.mark.parametrize("page_size", [16, 128])
def test_steps_of_decode_overlap(gpu_compiler, page_size):
    """Two steps of keys and values are under way at once; page numbers must not take up the pipeline."""
    fn, arrays = call(page_size=page_size, max_q_len=1, tokens=64)
    step = 2 * 64 * 128 * 2
    assert kernel_resources(fn, arrays, target="h200")["paged_decode"].shared_memory >= 2 * step


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"tokens": 256, "slots": 256, "max_q_len": 1}, ["paged_decode"]),
        ({"tokens": 8, "slots": 8, "max_q_len": 1}, ["paged_decode", "paged_decode_merge"]),
        ({"slots": 8}, ["paged_decode", "paged_decode_merge", "paged_prefill"]),
        ({"slots": 256}, ["paged_decode", "paged_prefill"]),
    ],
    ids=["decode of many", "decode of few", "mixed", "mixed of many"],
)
def test_launches(gpu_compiler, options, kernels):
    """What a layer launches: its kernels and nothing else; what depends on the batch alone is computed once."""
    launches = {}
    for layers in (1, 3):
        fn, arrays = call(**options, layers=layers)
        compiled = compile_for(fn, arrays)
        found = [each for each in entry_instructions(compiled) if each.opcode in ("fusion", "custom-call", "copy")]
        launches[layers] = len(found)
        assert sum(each.opcode == "custom-call" for each in found) == layers * len(kernels)
        assert not large_copies(compiled, min_bytes=arrays["q"].size)
    assert launches[3] - launches[1] == 2 * len(kernels)
    assert launches[1] - len(kernels) <= 5


def run_ptx(code, *operands):
    """What the few instructions of `triton_pools.assembly` do, for arrays of registers `$1`, `$2`, …; gives `$0`."""
    registers = {f"${i}": x for i, x in enumerate(operands, 1)}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in filter(None, map(str.strip, code.strip("{}").split(";")[1:])):
        opcode, rest = line.split(" ", 1)
        target, *names = rest.replace(" ", "").split(",")
        x = [value(name) for name in names]
        if opcode == "prmt.b32":
            source = [(x[i // 4] >> 8 * (i % 4)) & 0xFF for i in range(8)]
            result = sum(source[int(x[2]) >> 4 * i & 7] << 8 * i for i in range(4))
        elif opcode == "lop3.b32":
            table = [(int(x[3]) >> i & 1, [x[k] if i >> 2 - k & 1 else ~x[k] for k in range(3)]) for i in range(8)]
            result = functools.reduce(np.bitwise_or, [a & b & c for wanted, (a, b, c) in table if wanted])
        elif opcode.startswith("fma.rn."):
            half = {"bf16x2": jnp.bfloat16, "f16x2": np.float16}[opcode[7:]]
            a, b, c = (np.asarray(each, np.uint32).reshape(-1, 1).view(half).astype(np.float64) for each in x)
            with np.errstate(invalid="ignore"):  # NaN
                result = (a * b + c).astype(half).view(np.uint32)[:, 0]
        else:
            result = {"mov.b32": lambda a: a, "and.b32": np.bitwise_and, "shr.u32": np.right_shift}[opcode](*x)
        registers[target] = result
    return registers["$0"]


@pytest.mark.parametrize("stored", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_bytes_are_exact(stored, dtype):
    """Every code in every place of a word, however it is converted; what GPUs without float8 do too."""
    every = np.arange(256, dtype=np.uint8)
    expected = every.view(jnp.dtype(stored)).astype(np.float32)
    finite = np.isfinite(expected)
    for capability in (None, (8, 0), (8, 9)):
        features = triton_common.Features(1.0, None, capability, jnp.dtype(stored))
        converted = triton_pools._converted(jnp.asarray(every.view(jnp.dtype(stored))), dtype, features)
        assert converted.dtype == dtype
        np.testing.assert_array_equal(np.asarray(converted, np.float32)[finite], expected[finite])
    if dtype != jnp.float32:
        words = np.random.default_rng(0).permuted(np.tile(every, (8, 1)), axis=1)
        first, second = (np.ascontiguousarray(part.T).view(np.uint32)[:, 0] for part in (words[:4], words[4:]))
        for index in range(4):
            pair = run_ptx(triton_pools.assembly(index, jnp.dtype(stored), dtype), first, second)
            got = pair.reshape(-1, 1).view(jnp.dtype(dtype)).astype(np.float32)
            wanted = expected[words[[index, 4 + index]].T]
            np.testing.assert_array_equal(got[np.isfinite(wanted)], wanted[np.isfinite(wanted)])


def config_of_decode(programs, kind="NVIDIA H200", cores=132, window=None, **options):
    _, arrays = call(**options)
    gpu = dispatch.Gpu(kind, dispatch.capability_of(kind), cores)
    return triton.decode_config(arrays["q"], arrays["key_pages"], arrays["page_table"], window, programs, gpu)


def test_splits_fill_the_gpu():
    """Two programs a core, but no part shorter than a step, and no merge for the last tenth."""
    assert [config_of_decode(programs).splits for programs in (256, 33, 16, 8, 4, 1)] == [1, 1, 2, 4, 8, 30]
    assert config_of_decode(8, cores=1000).splits == 29
    assert config_of_decode(1, window=256).splits == 4
    assert config_of_decode(1, heads=(71, 1), head_dim=64, pages_per_slot=4).splits == 2


def test_tuned_block_sizes(monkeypatch):
    """An entry of the table may give some of the sizes; the rules give the others."""
    shape = {"kind": "decode", "head_dim": 128, "page_size": 64, "group": 4, "dtype": "bfloat16", "stored": "bfloat16"}
    entries = [{"capability": "9.0", "shape": shape, "config": {"keys": 32, "programs_per_core": 8}}]
    monkeypatch.setattr(dispatch, "_table", {"ragged_paged_attention": entries}.get)
    tuned = config_of_decode(8)
    assert (tuned.keys, tuned.splits, tuned.num_warps) == (32, 15, 4)
    assert config_of_decode(8, kind="NVIDIA B200").keys == 64

    entries[0] |= {"shape": shape | {"kind": "prefill"}, "config": {"num_warps": 4}}
    _, arrays = call()
    for kind, num_warps in (("NVIDIA H200", 4), ("NVIDIA B200", 8)):
        gpu = dispatch.Gpu(kind, dispatch.capability_of(kind), 132)
        config = triton.prefill_config(arrays["q"], arrays["key_pages"], (None, None), Mask(None, True, False), gpu)
        assert (config.num_warps, config.rows) == (num_warps, 128)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, "Tesla T4", "compute capability 7.5, Triton needs 8.0"),
        ({"head_dim": 288}, None, "head size 288 is above 256"),
        ({"page_size": 24}, None, "page size 24 is none of"),
        ({"page_size": 256}, None, "page size 256 is none of"),
        ({"stored": jnp.int8, "head_dim": 50}, None, "head size 50 is no multiple of 4"),
        ({"dtype": jnp.float64}, None, "queries are float64"),
        ({"stored": jnp.int4}, None, "pages are int4"),
        ({"dtype": jnp.float32, "stored": jnp.int8, "head_dim": 256}, "NVIDIA H200", "do not fit in registers"),
    ],
)
def test_refusals(options, kind, message):
    with jax.enable_x64(True):
        _, arrays = call(**options)
        gpu = dispatch.Gpu(kind, dispatch.capability_of(kind), 40) if kind else None
        (reason,) = triton.refusals(arrays["q"], arrays["key_pages"], gpu=gpu)
    assert message in reason


@pytest.mark.parametrize("options", [{}, {"stored": jnp.int8, "pages": 48_000}, {"pages": 45_000}])
def test_nothing_to_refuse(options):
    _, arrays = call(**options)
    assert triton.refusals(arrays["q"], arrays["key_pages"], gpu=dispatch.Gpu("NVIDIA A100", (8, 0), 108)) == []


@functools.partial(jax.jit, static_argnums=(1, 2))
def blocks_of(q_lens, block, num_blocks):
    return query_blocks(q_lens, block, num_blocks)


@hypothesis.given(st.lists(st.integers(0, 40), min_size=5, max_size=5), st.sampled_from([1, 7, 16]))
def test_query_blocks(q_lens, block):
    """The blocks cover every row once, in order, and the bound is enough for the worst of batches."""
    expected = [(slot, start) for slot, length in enumerate(q_lens) for start in range(0, length, block)]
    num_blocks = num_query_blocks(5 * 40, 5, block)
    slot, start = blocks_of(jnp.array(q_lens), block, num_blocks)
    found = list(zip(slot.tolist(), start.tolist(), strict=True))
    assert found == expected + [(5, 0)] * (num_blocks - len(expected))


@pytest.mark.parametrize("q_lens", [[1, 1, 1], [17, 16, 15], [33, 1, 14]])
def test_bound_of_blocks(q_lens):
    assert sum(math.ceil(length / 16) for length in q_lens) <= num_query_blocks(sum(q_lens), len(q_lens), 16)
