"""Compiling for GPUs that are not there, and reading what was compiled."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.targets import compile_for, entry_instructions, large_copies, memory

CACHE = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
CACHE_BYTES = 1024 * 512 * 2
ROWS = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)


def update(cache, rows, key):
    at = jax.random.randint(key, (4,), 0, cache.shape[0])
    return cache.at[at].set(rows)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_donated_update_is_in_place(gpu_compiler, target):
    compiled = compile_for(update, CACHE, ROWS, jax.random.key(0), target=target, donate_argnums=0)
    assert memory(compiled).alias == CACHE_BYTES
    assert memory(compiled).temporaries < CACHE_BYTES
    assert large_copies(compiled, CACHE_BYTES) == []


@pytest.mark.parametrize("target", ["h200", "a100"])
def test_update_without_donation_copies(gpu_compiler, target):
    compiled = compile_for(update, CACHE, ROWS, jax.random.key(0), target=target)
    assert memory(compiled).alias == 0
    (copy,) = large_copies(compiled, CACHE_BYTES)
    assert (copy.opcode, copy.nbytes) == ("copy", CACHE_BYTES)
    assert copy in entry_instructions(compiled)


def test_copies_inside_fusions_are_found(gpu_compiler):
    def gathered(cache, pages):
        return cache[pages].astype(jnp.float32).sum(axis=1) * 2

    compiled = compile_for(gathered, CACHE, jax.ShapeDtypeStruct((256,), jnp.int32))
    (gather,) = large_copies(compiled, 256 * 512 * 2)
    assert gather.opcode == "gather"
    assert gather.op_name.endswith("gather")
    assert gather not in entry_instructions(compiled)


def test_layers_sliced_from_a_stack_are_found(gpu_compiler):
    def scanned(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = jax.ShapeDtypeStruct((8, 512, 512), jnp.bfloat16)
    compiled = compile_for(scanned, ROWS, stack)
    assert "dynamic-slice" in {each.opcode for each in large_copies(compiled, 512 * 512 * 2)}


def test_arguments_of_all_kinds(gpu_compiler):
    def fn(count, tree, scale, *, bias):
        return [tree["array"] * scale + bias] * count

    tree = {"array": np.ones((16,), np.float32), "nothing": None}
    compiled = compile_for(fn, 2, tree, 2.0, bias=jnp.float32(1), static_argnums=0)
    assert memory(compiled).outputs >= 2 * 16 * 4
    by_name = compile_for(
        jax.jit(fn, static_argnames="count"), tree=tree, scale=3, bias=1.0, count=3, static_argnames="count"
    )
    assert memory(by_name).outputs >= 3 * 16 * 4
    with_negative_number = compile_for(lambda x, count: [x] * count, ROWS, 3, static_argnums=-1)
    assert memory(with_negative_number).outputs >= 3 * 4 * 512 * 2


def test_jitted_function_keeps_its_donation(gpu_compiler):
    compiled = compile_for(jax.jit(update, donate_argnums=0), CACHE, ROWS, jax.random.key(0))
    assert memory(compiled).alias == CACHE_BYTES


def test_program_over_four_gpus(gpu_compiler):
    mesh = jax.sharding.Mesh(targets.topology("h200", "1x1x4").devices, ("model",))

    def split(shape, *names):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    compiled = compile_for(jnp.matmul, split((64, 512), None, "model"), split((512, 256), "model", None))
    assert any(each.opcode.startswith("all-reduce") for each in entry_instructions(compiled))


def test_mosaic_kernel_is_refused_before_hopper(gpu_compiler):
    def kernel(x):
        return jax.ffi.ffi_call("mosaic_gpu_v2", x)(x)

    with pytest.raises(ValueError, match="capability 9.0"):
        compile_for(kernel, ROWS, target="a100")


def test_unknown_target_names_those_known():
    with pytest.raises(ValueError, match=r"'h300'.*h200"):
        targets.get_target("h300")


def test_capabilities_compare():
    assert targets.get_target("l4").capability < (9, 0) <= targets.H200.capability < targets.B200.capability
    assert targets.get_target(targets.H100) is targets.H100


def test_programs_for_the_cpu_can_be_read():
    compiled = jax.jit(update, donate_argnums=0).lower(CACHE, ROWS, jax.random.key(0)).compile()
    assert memory(compiled).alias == CACHE_BYTES
    assert entry_instructions(compiled)


def test_reading_program_text():
    text = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused (p: s4[6,3]) -> s4[3,6] {
  %p = s4[6,3]{1,0} parameter(0)
  ROOT %t.1 = s4[3,6]{1,0:E(4)} transpose(%p), dimensions={1,0}, metadata={op_name="jit(f)/transpose" stack_frame_id=2}
}

ENTRY %main.8 (x: f32[4], m: pred[3]) -> (f32[4], u32[]) {
  %x = f32[4]{0} parameter(0)
  %m = pred[3]{0} parameter(1)
  %copy-start = (f32[4]{0}, f32[4]{0}, u32[], /*index=3*/f8e4m3fn[99]{0}) copy-start(%x)
  ROOT %tuple = (f32[4]{0}, u32[]) tuple(%x, %m)
}
"""

    class Program(jax.stages.Compiled):
        def __init__(self):
            pass

        def as_text(self):
            return text

    program = Program()
    assert [(each.name, each.opcode, each.nbytes) for each in entry_instructions(program)] == [
        ("x", "parameter", 16),
        ("m", "parameter", 3),
        ("copy-start", "copy-start", 99),
        ("tuple", "tuple", 16),
    ]
    tuple_ = entry_instructions(program)[-1]
    assert (tuple_.operands, tuple_.is_root, tuple_.in_entry) == (("x", "m"), True, True)
    transpose, copy = large_copies(program, 9)
    assert (transpose.operands, transpose.is_root, transpose.in_entry) == (("p",), True, False)
    assert transpose.attributes.startswith(", dimensions={1,0}")
    assert (transpose.computation, transpose.nbytes, transpose.op_name) == ("fused", 9, "jit(f)/transpose")
    assert copy.computation == "main.8"
    assert large_copies(program, 100) == []
    assert [each.opcode for each in large_copies(program, 0, opcodes=("tuple",))] == ["tuple"]


def test_dumps_leave_no_trace_in_the_process(gpu_compiler, tmp_path):
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = dict(os.environ), [getattr(jax.config, name) for name in names]
    compile_for(update, CACHE, ROWS, jax.random.key(0), dump_to=tmp_path)
    assert (dict(os.environ), [getattr(jax.config, name) for name in names]) == before
    assert list(tmp_path.glob("*.ptx"))
    assert list(tmp_path.glob("*.thunk_sequence.txt"))
