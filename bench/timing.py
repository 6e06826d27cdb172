"""How long one call of a kernel takes on a GPU, from outside: the slope of wall time over calls.

A kernel of a decode step takes 5 to 50 microseconds; a call from Python costs more than that. So a *program* is timed,
in which the op is called several times in a chain, each call waiting for the one before, as the layers of a model do.
In JAX that is one compiled program with the calls unrolled, which XLA runs as CUDA graphs; in torch a CUDA graph that
was captured from as many calls. Programs are started without waiting for them, `few` times and then `many` times, and

    seconds a call = (wall(many) - wall(few)) / ((many - few) * calls a program)

so what it costs to start, to wait and to look at the clock cancels. Launches within a graph and one start of a graph a
program do not: a model pays for these too. Nothing of it needs a profiler. Should the host be the slower one after all,
the figure would be its own: that shows, since nothing is left to wait for at the end, and the result says `host_bound`.

What a decode step reads, weights and pages, is never in the L2 cache when it is read. So calls rotate over copies that
together are far larger than the cache (`rotations`). What the kernel before has just written is in the cache: it is
left there.

All contenders of a case are compiled and warmed up first, then measured in turns, A B A B, so that a change of clocks
meets all of them. The median counts; lowest and highest go with it.

A chain needs each call to depend on the one before. Where the result has the form of an argument, as in attention, it
takes its place. Elsewhere `touch` writes one element of the argument, or rather does not, which is one more tiny launch
a call: the time of such a launch is measured too (`floor` in the ceilings), and results say where they hold one.
"""

import concurrent.futures
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

L2_BYTES = 60 * 2**20  # of the largest cache among GPUs up to Hopper
FLUSH_BYTES = int(2.5 * L2_BYTES)
MOST_CALLS = 72
FEWEST_CALLS = 8
HOST_BOUND = 0.01  # of the time must be left to wait for when all programs are started

is_rehearsal = False  # whether programs are as short as can be, since nothing is learnt from their times
# Contenders of a case are compiled side by side.
_compilers = concurrent.futures.ThreadPoolExecutor(8)


@dataclasses.dataclass
class Contender:
    """Something to be timed.

    Attributes:
        run: starts one program and returns what to wait for.
        wait: waits for it.
        calls: of the op in a program.
        before: what puts its state back, before each sample and outside the clock.
        most: programs that a sample may have.
        notes: what a reader of the figure should know.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int
    before: Callable[[], Any] | None = None
    most: int = 1000
    notes: list[str] = dataclasses.field(default_factory=list)


def rotations(bytes_per_call: int) -> int:
    """Copies that a call's cold bytes need, so that none is in the L2 cache when its turn comes again."""
    if is_rehearsal:
        return 2
    return max(1, min(MOST_CALLS, math.ceil(FLUSH_BYTES / max(1, bytes_per_call))))


def calls_of(rotation: int) -> int:
    """Calls of a program that rotates over so many copies: whole rounds, and enough to make the start cheap."""
    return 2 if is_rehearsal else rotation * math.ceil(FEWEST_CALLS / rotation)


def sample(contender: Contender, programs: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Seconds from start to end of so many programs, and how many of those were spent waiting at the end."""
    if contender.before is not None:
        contender.before()
    result = None
    begin = clock()
    for _ in range(programs):
        result = contender.run()
    started = clock()
    contender.wait(result)
    end = clock()
    return end - begin, end - started


def plan_programs(contender: Contender, seconds: float, clock: Callable[[], float] = time.perf_counter):
    """How many programs the short and the long sample take, so that the long one lasts about so many seconds."""
    for _ in range(2):  # XLA records CUDA graphs when a program runs the second time
        sample(contender, 1, clock)
    estimate = max(sample(contender, 4, clock)[0] / 4, 1e-7)
    many = max(4, min(contender.most, math.ceil(seconds / estimate)))
    return max(1, many // 4), many


def measure(
    contenders: dict[str, Contender],
    rounds: int = 7,
    seconds: float = 0.01,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Times contenders in turns.

    Args:
        contenders: by name; one that raises drops out, with its reason.
        rounds: samples of each.
        seconds: about how long a sample lasts.
        clock: in seconds.

    Returns:
        For each name `median`, `low` and `high` seconds a call, `samples`, `host_bound` and `notes`; or `error`.
    """
    found: dict[str, dict[str, Any]] = {}
    plans, slopes, waits = {}, {}, {}
    for name, contender in contenders.items():
        try:
            sample(contender, 1, clock)  # so that nothing compiles any more when the first is measured
            slopes[name], waits[name] = [], []
        except Exception as error:  # whatever a rival's library raises, the others go on
            found[name] = failure(error)
    for name in slopes:
        plans[name] = plan_programs(contenders[name], seconds, clock)
    for _ in range(rounds):
        for name, (few, many) in plans.items():
            contender = contenders[name]
            short, _ = sample(contender, few, clock)
            long, wait = sample(contender, many, clock)
            slopes[name].append((long - short) / ((many - few) * contender.calls))
            waits[name].append(wait / long)
    for name, values in slopes.items():
        found[name] = {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "samples": len(values),
            "calls": contenders[name].calls,
            "host_bound": statistics.median(waits[name]) < HOST_BOUND,
            "notes": contenders[name].notes,
        }
    return found


def failure(error: BaseException) -> dict[str, str]:
    """Why something did not run, as a result can hold it."""
    return {"error": f"{type(error).__name__}: {str(error)[:600]}"}


def touch(carry: Any, out: Any) -> Any:
    """The carry, of which one element waits for a result: it would change if that held a number that it never holds."""
    out = jax.tree.leaves(out)[0]
    leaves, tree = jax.tree.flatten(carry)
    seen = out[(0,) * out.ndim] == -12345.5
    # An addition, which XLA updates in place with one launch; a choice of the element or zero takes it two.
    touched = leaves[0].at[(0,) * leaves[0].ndim].add(seen.astype(leaves[0].dtype))
    return jax.tree.unflatten(tree, [touched, *leaves[1:]])


def replace(carry: Any, out: Any) -> Any:
    """The result in place of the carry."""
    del carry
    return out


def chain(op: Callable[..., Any], calls: int, follow: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The program of `chained`: a function of carry, constants and the list of what varies."""
    once = jax.jit(lambda *arguments: op(*arguments))  # a function of its own: JAX keeps what it traced by function

    def program(carry, constants, varying):
        if calls == 1:
            return once(carry, constants, varying[0])
        for i in range(calls):
            # The barrier keeps XLA from making one kernel of several calls, or leaving out what the next does not read.
            result = lax.optimization_barrier(once(carry, constants, varying[i % len(varying)]))
            carry = follow(carry, result)
        return carry

    return program


def chained(
    op: Callable[..., Any],
    carry: Any,
    constants: Any,
    varying: Sequence[Any],
    *,
    follow: Callable[[Any, Any], Any] = touch,
    calls: int | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Contender:
    """A JAX op as a contender: `op(carry, constants, varying[i])`, then `carry = follow(carry, result)`, and again.

    Args:
        op: traced once.
        carry: what depends on the call before; it is copied, and the copy updated in place.
        constants: a pytree that all calls share.
        varying: pytrees that the calls take in turn.
        follow: makes the next carry; with one call a program it is left out.
        calls: of a program, default whole rounds of `varying`.
        compiler_options: of XLA, by name.

    Returns:
        The contender. Tracing raises here what it raises, compiling when it first runs.
    """
    calls = calls or calls_of(len(varying))
    arguments = (constants, list(varying[:calls]))
    lowered = jax.jit(chain(op, calls, follow), donate_argnums=0 if calls > 1 else ()).lower(carry, *arguments)
    compiled = _compilers.submit(lowered.compile, compiler_options=compiler_options)
    state = [jax.tree.map(jnp.copy, carry) if calls > 1 else carry]

    def run():
        result = compiled.result()(*state, *arguments)
        if calls > 1:
            state[0] = result
        return result

    notes = ["one tiny launch a call is the chain's"] if calls > 1 and follow is touch else []
    return Contender(run, jax.block_until_ready, calls, notes=notes)


def captured(call: Callable[[int], Any], rotation: int, calls: int | None = None) -> Contender:
    """Torch code as a contender: `call(0)`, `call(1)`, …, `call(rotation - 1)` and again, captured as a CUDA graph."""
    import torch

    calls = calls or calls_of(rotation)
    if not torch.cuda.is_available():

        def run_eagerly():
            for i in range(calls):
                call(i % rotation)

        return Contender(run_eagerly, lambda _: None, calls, notes=["no CUDA: not a graph"])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing needs everything compiled and allocated
        for i in range(min(3, rotation)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % rotation)
    return Contender(graph.replay, lambda _: torch.cuda.synchronize(), calls)


@functools.cache
def ceilings(tiny: bool = False) -> dict[str, Any]:
    """What this GPU does at best, measured now: bytes/s of a copy, FLOP/s of a product, seconds of a launch.

    Bytes are counted read and written. The product is bf16, 8192 cubed, of random numbers: zeros would be faster, since
    they take less power. Of what JAX and torch reach the higher counts.
    """
    size, side = (2**12, 64) if tiny else (2**31, 8192)
    numbers = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1))
    matrices = [jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys]
    contenders = {
        "copy": chained(lambda x, _, __: -x, numbers, None, [None], calls=1),
        "matmul": chained(lambda x, y, _: x @ y, matrices[0], matrices[1], [None], calls=1),
        "floor": _floor(tiny),
    }
    try:
        contenders |= _torch_ceilings(size, side)
    except ImportError:
        pass
    found = measure(contenders, rounds=2 if tiny else 5, seconds=1e-3 if tiny else 0.05)
    work = {"copy": 2 * numbers.nbytes, "matmul": 2 * side**3}
    best: dict[str, Any] = {"details": found, "floor": found["floor"].get("median")}
    for name, amount in work.items():
        times = [each["median"] for key, each in found.items() if key.endswith(name) and "median" in each]
        best[name] = amount / min(times)
    return best


def _floor(tiny: bool) -> Contender:
    from pallas_kernels.compat import triton_call

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    def call(x, _, __):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return triton_call(kernel, x, out_shape=out, grid=(1,), name="nothing", num_warps=1, num_stages=1)

    return chained(call, jnp.zeros(128), None, [None], follow=replace, calls=2 if tiny else 64)


def _torch_ceilings(size: int, side: int) -> dict[str, Contender]:
    import torch

    if not torch.cuda.is_available():
        return {}
    source = torch.randn(size // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    x, y = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    return {
        "torch copy": captured(lambda _: target.copy_(source), 1, calls=1),
        "torch matmul": captured(lambda _: torch.matmul(x, y, out=out), 1, calls=1),
    }
