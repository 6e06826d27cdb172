"""What a compiled program launches, in which CUDA graphs, and how many bytes it moves."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.launches import Launch, Schedule, read_schedule, traffic
from pallas_kernels.targets import compile_for

X = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
W = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
N = jax.ShapeDtypeStruct((), jnp.int32)
POOL = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
ROW = 256 * 2


def layers(x, w, count=6):
    for _ in range(count):
        x = jnp.tanh(x @ w)
    return x


def schedule_of(fn, *args, folder, **options):
    compiled = compile_for(fn, *args, dump_to=folder, **options)
    return compiled, read_schedule(folder)


def bytes_moved(compiled, schedule, **options):
    return sum(traffic(compiled, schedule, **options).values())


@pytest.mark.parametrize("target", ["h200", "a100"])
def test_straight_line_is_one_graph(gpu_compiler, tmp_path, target):
    def fn(x, w, n):
        x = jax.lax.cond(n > 3, lambda x: jnp.sin(x @ w), lambda x: layers(x, w), layers(x, w))
        return layers(x, w)

    _, schedule = schedule_of(fn, X, W, N, folder=tmp_path, target=target)
    assert (schedule.cuda_graphs, schedule.outside_graphs, schedule.loops) == (1, [], [])
    assert all(launch.in_graph for launch in schedule.launches)
    # The branch of six products is left out of what runs at least.
    assert schedule.most_launches >= len(schedule.launches) + 5


def test_a_loop_cuts_the_graph(gpu_compiler, tmp_path):
    def fn(x, w, n):
        x = jax.lax.fori_loop(0, n, lambda _, x: layers(x, w), layers(x, w))
        return layers(x, w)

    compiled, schedule = schedule_of(fn, X, W, N, folder=tmp_path)
    assert schedule.cuda_graphs == 3
    (loop,) = schedule.loops
    assert schedule.outside_graphs[0] == loop
    assert len([launch for launch in schedule.launches if launch.loops == (loop,)]) >= 6
    assert {traffic(compiled, schedule)[launch.instruction] for launch in schedule.launches if launch.loops} == {None}


def test_a_loop_of_known_length_is_multiplied(gpu_compiler, tmp_path):
    def fn(x, w, trips):
        return jax.lax.fori_loop(0, trips, lambda _, x: layers(x, w, 1), x)

    moved = {}
    for trips in (2, 10):
        moved[trips] = bytes_moved(*schedule_of(fn, X, W, trips, static_argnums=2, folder=tmp_path / str(trips)))
    assert moved[10] - moved[2] >= 8 * 256 * 256 * 2


def test_loops_in_branches_and_in_loops(gpu_compiler, tmp_path):
    def loop(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x) * 2, x)

    def fn(x, w, n):
        return layers(jax.lax.cond(n > 3, lambda x: loop(x, w, n), lambda x: x, x), w)

    _, schedule = schedule_of(fn, X, W, N, folder=tmp_path)
    assert len(schedule.loops) == 2
    assert set(schedule.loops) < set(schedule.outside_graphs)
    # Where the condition is false there is one copy at most, and the products after it.
    assert all(launch.loops == () for launch in schedule.launches)


def test_bytes_of_products(gpu_compiler, tmp_path):
    compiled, schedule = schedule_of(lambda x, w: jnp.tanh(x @ w), X, W, folder=tmp_path)
    least = 256 * 256 * 2 + 2 * 64 * ROW
    # A product may be split along what is summed over, with partial sums in float32 between its two launches.
    assert least <= bytes_moved(compiled, schedule) <= 16 * least


def test_bytes_picked_and_updated_in_place(gpu_compiler, tmp_path):
    def fn(pool, rows, index):
        new = pool.at[index].set(rows, mode="drop")
        return new, new[index + 1].astype(jnp.float32) * 2

    index = jax.ShapeDtypeStruct((8,), jnp.int32)
    rows = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    compiled, schedule = schedule_of(fn, POOL, rows, index, folder=tmp_path, donate_argnums=0)
    # Rows are read, written, and read again; the results are float32.
    assert 5 * 8 * ROW <= bytes_moved(compiled, schedule) <= 6 * 8 * ROW + 4096
    compiled, schedule = schedule_of(fn, POOL, rows, index, folder=tmp_path / "copied")
    assert bytes_moved(compiled, schedule) >= 2 * 4096 * ROW


def test_bytes_of_a_slice_and_of_an_update(gpu_compiler, tmp_path):
    def fn(pool, rows, n):
        picked = jax.lax.dynamic_slice_in_dim(pool, n, 8)
        return jax.lax.dynamic_update_slice_in_dim(pool, rows * 2, n + 64, 0), picked * 3

    rows = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    compiled, schedule = schedule_of(fn, POOL, rows, N, folder=tmp_path, donate_argnums=0)
    assert 4 * 8 * ROW <= bytes_moved(compiled, schedule) <= 5 * 8 * ROW


def test_bytes_of_calls():
    text = """HloModule jit_f

ENTRY %main (q: bf16[8,128], pages: bf16[1024,128]) -> bf16[1024,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %pages = bf16[1024,128]{1,0} parameter(1)
  %w = bf16[128,128]{1,0} parameter(2)
  %write = (bf16[1024,128]{1,0}, bf16[8,128]{1,0}) custom-call(%q, %pages), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (1, {})}, backend_config={x = {}}
  %get = bf16[1024,128]{1,0} get-tuple-element(%write), index=0
  %product = (bf16[8,128]{1,0}, s8[99999]{0}) custom-call(%q, %w), custom_call_target="__cublas$lt$matmul"
  %prefill = bf16[8,128]{1,0} custom-call(%q, %get), custom_call_target="__gpu$xla.gpu.triton"
  %other = bf16[1024,128]{1,0} get-tuple-element(%write), index=0
  %view = bf16[2048,64]{1,0} bitcast(%other)
  %decode = bf16[8,128]{1,0} custom-call(%q, %view), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %alone = bf16[1024,128]{1,0} custom-call(%get, %q), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{}: (0, {})}
}
"""  # noqa: E501

    class Program(jax.stages.Compiled):
        def __init__(self):
            pass

        def as_text(self):
            return text

    def moved(*names, **options):
        launches = [Launch("kCustomCall", "", name, True, ()) for name in names]
        return bytes_moved(Program(), Schedule(launches, len(names), 1, [], []), **options)

    rows, pages = 8 * 128 * 2, 1024 * 128 * 2
    assert moved("write") == 3 * rows
    assert moved("product") == 128 * 128 * 2 + 2 * rows
    assert moved("alone") == 2 * rows
    assert moved("write", "alone") == 5 * rows
    assert moved("prefill", "decode") == 2 * pages + 4 * rows
    assert moved("prefill", "decode", parted=pages) == pages + 4 * rows
    assert moved("write", "prefill", "alone", parted=pages) == pages + 7 * rows


def test_a_folder_without_a_program(tmp_path):
    with pytest.raises(FileNotFoundError, match="dumped"):
        read_schedule(tmp_path)
