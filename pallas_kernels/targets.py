"""NVIDIA GPUs as compilation targets, on a machine that has none.

XLA compiles a whole program for a GPU that it only knows from a description: no driver, no device and none of the CUDA
libraries are needed, just JAX's CUDA plugin and the `ptxas` wheel. The compiled program can not run, but it can be
read: which buffers are donated, how much temporary memory it takes, what it copies.

    compiled = compile_for(step, params, state, target="h200", donate_argnums=1)
    assert memory(compiled).alias == bytes_of(state)
    assert not large_copies(compiled, min_bytes=bytes_of_one_page_buffer)

Run with `JAX_PLATFORMS=cpu`, else the plugin looks for a driver when it is loaded, and gives up.
"""

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import math
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Target:
    """An NVIDIA GPU as the compiler sees it.

    Attributes:
        name: the name by which functions of this module know it, `"h200"`.
        device_kind: what `jax.Device.device_kind` says on such a machine.
        major: compute capability, before the point.
        minor: compute capability, after the point.
        accelerated: whether architecture-specific instructions may be used (`sm_90a`, not `sm_90`).
        cores: streaming multiprocessors.
        fpus_per_core: float32 units of a multiprocessor.
        threads_per_core: resident threads of a multiprocessor.
        shared_memory_per_block: most shared memory that a block may opt in to, in bytes.
        shared_memory_per_core: shared memory of a multiprocessor, in bytes.
        l2_cache: in bytes.
        memory: device memory, in bytes.
        bandwidth: peak bandwidth of the device memory, in bytes a second.
        clock_ghz: highest clock of the multiprocessors.
    """

    name: str
    device_kind: str
    major: int
    minor: int
    accelerated: bool
    cores: int
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_block: int
    shared_memory_per_core: int
    l2_cache: int
    memory: int
    bandwidth: int
    clock_ghz: float

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability as a pair that compares: `(9, 0)`."""
        return self.major, self.minor


A100 = Target(
    name="a100",
    device_kind="NVIDIA A100-SXM4-80GB",
    major=8,
    minor=0,
    accelerated=False,
    cores=108,
    fpus_per_core=64,
    threads_per_core=2048,
    shared_memory_per_block=166_912,
    shared_memory_per_core=167_936,
    l2_cache=41_943_040,
    memory=80 * 2**30,
    bandwidth=2_040_000_000_000,
    clock_ghz=1.41,
)
L4 = Target(
    name="l4",
    device_kind="NVIDIA L4",
    major=8,
    minor=9,
    accelerated=False,
    cores=58,
    fpus_per_core=128,
    threads_per_core=1536,
    shared_memory_per_block=101_376,
    shared_memory_per_core=102_400,
    l2_cache=50_331_648,
    memory=24 * 2**30,
    bandwidth=300_000_000_000,
    clock_ghz=2.04,
)
H100 = Target(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    accelerated=True,
    cores=132,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_memory_per_block=232_448,
    shared_memory_per_core=233_472,
    l2_cache=52_428_800,
    memory=80 * 2**30,
    bandwidth=3_350_000_000_000,
    clock_ghz=1.98,
)
H200 = dataclasses.replace(
    H100, name="h200", device_kind="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000
)
B200 = Target(
    name="b200",
    device_kind="NVIDIA B200",
    major=10,
    minor=0,
    accelerated=True,
    cores=148,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_memory_per_block=232_448,
    shared_memory_per_core=233_472,
    l2_cache=132_644_864,
    memory=180 * 2**30,
    bandwidth=8_000_000_000_000,
    clock_ghz=1.965,
)

TARGETS: dict[str, Target] = {target.name: target for target in (A100, L4, H100, H200, B200)}


def get_target(target: str | Target) -> Target:
    """Returns the target of that name, or the target itself.

    Args:
        target: a `Target`, or the name of one of `TARGETS`.

    Raises:
        ValueError: no target has that name; the message lists those known.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ValueError(f"unknown GPU target {target!r}; known are {', '.join(TARGETS)}")
    return TARGETS[target]


def target_config_text(target: str | Target) -> str:
    """Describes a target to XLA, as a `stream_executor.GpuTargetConfigProto` in text form."""
    target = get_target(target)
    extension = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    # Without a driver's version, or with one before 12.3, XLA puts conditionals and custom calls outside CUDA graphs.
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {target.threads_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_memory_per_block}
  shared_memory_per_core: {target.shared_memory_per_core}
  core_count: {target.cores}
  fpus_per_core: {target.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2_cache}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {target.major} minor: {target.minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{target.device_kind}"
"""


@functools.cache
def available() -> str | None:
    """Tells whether this process can compile for a GPU that is not there.

    Returns:
        None if it can, else the reason in words.
    """
    plugins = [version for version in ("13", "12") if _find(f"jax_plugins.xla_cuda{version}")]
    if not plugins:
        return "JAX's CUDA plugin is not installed (jax-cuda12-plugin and jax-cuda12-pjrt, or the cuda13 ones)"
    if not cuda_tools("ptxas"):
        wheels = "nvidia-cuda-nvcc, nvidia-nvvm" if plugins[0] == "13" else "nvidia-cuda-nvcc-cu12"
        return f"the CUDA plugin is installed but ptxas is not ({wheels})"
    try:
        topology(H200)
    # The plugin's own errors have no common class, and every one of them means the same here: it does not work.
    except Exception as error:
        return f"the CUDA plugin does not load: {error} (JAX_PLATFORMS=cpu keeps it from looking for a driver)"
    return None


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


def _cuda_roots() -> list[pathlib.Path]:
    # The same two packages that JAX itself looks into for its CUDA path; both may be namespace packages.
    specs = [_find("nvidia.cu13"), _find("nvidia.cuda_nvcc")]
    return [pathlib.Path(root) for spec in specs if spec for root in spec.submodule_search_locations or ()]


def cuda_tools(name: str) -> list[str]:
    """Finds a program of the CUDA toolkit, `"ptxas"` or `"nvdisasm"`: among the installed wheels, then on the PATH."""
    wheels = (root / "bin" / name for root in _cuda_roots())
    found = [str(path) for path in wheels if path.exists()]
    return [*found, path] if (path := shutil.which(name)) else found


@functools.cache
def topology(target: str | Target, shape: str = "1x1x1") -> topologies.TopologyDescription:
    """Describes one or many GPUs of a kind, none of which has to exist.

    Args:
        target: a `Target` or its name.
        shape: `"{slices}x{processes}x{devices}"`: `"1x1x4"` is four GPUs of one process, `"1x2x8"` two hosts of eight.

    Returns:
        The topology; its `devices` serve in a `Mesh` or a `SingleDeviceSharding`.

    Raises:
        NotImplementedError: the CUDA plugin is missing or did not load; see `available`.
    """
    target = get_target(target)
    return topologies.get_topology_desc(target.name, "cuda", target_config=target_config_text(target), topology=shape)


def sharding(target: str | Target) -> jax.sharding.SingleDeviceSharding:
    """Places an abstract array on one GPU of that kind."""
    return jax.sharding.SingleDeviceSharding(topology(get_target(target)).devices[0])


@dataclasses.dataclass(frozen=True)
class _AbstractGpu(jax.sharding.AbstractDevice):
    # Mosaic lowers for this capability if the abstract device has one, and for 9.0 if it has none.
    compute_capability: str


def compile_for(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target = "h200",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    dump_to: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> jax.stages.Compiled:
    """Compiles a function for a GPU that does not have to exist.

    Args:
        fn: what to compile. If it comes from `jax.jit` and no donation is asked for here, its own options hold, and
            the static arguments named here are those that it has.
        *args: pytrees of arrays, scalars or `jax.ShapeDtypeStruct`s; only shapes and dtypes are looked at. A struct
            that has a sharding keeps it (for programs over many GPUs of `topology`), all else is placed on one GPU.
        target: a `Target` or its name.
        donate_argnums: positions of the arguments whose buffers the program may reuse.
        static_argnums: positions of the arguments that are compile-time constants.
        static_argnames: names of the keyword arguments that are.
        dump_to: a folder for what the compiler can tell of the program beside its text: the PTX of every kernel, and
            the order of its launches.
        **kwargs: more arguments of `fn`, treated as `args`.

    Returns:
        The compiled program, for `memory`, `large_copies`, `entry_instructions` and `as_text()`.

    Raises:
        ValueError: the function holds a Mosaic kernel and the target is older than Hopper.

    A process can compile Mosaic kernels for one capability only: the plugin keeps the architecture that it first gave
    to `ptxas`. Triton kernels and plain XLA programs may change target from call to call.
    """
    target = get_target(target)
    # Wrapping a jitted function again would silently drop the donation that it asks for.
    if hasattr(fn, "lower") and donate_argnums == ():
        jitted: Any = fn
    else:
        jitted = jax.jit(
            fn, donate_argnums=donate_argnums, static_argnums=static_argnums, static_argnames=static_argnames
        )

    place = functools.partial(_placed, where=sharding(target))
    numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    static = {number % len(args) for number in numbers}
    args = tuple(arg if i in static else jax.tree.map(place, arg) for i, arg in enumerate(args))
    kwargs = {name: arg if name in names else jax.tree.map(place, arg) for name, arg in kwargs.items()}
    device = _AbstractGpu(target.device_kind, target.cores, "gpu", f"{target.major}.{target.minor}")
    # Pallas asks the mesh in context, not the arguments, which GPU it lowers for.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device)):
        lowered = jitted.lower(*args, **kwargs)
        # LLVM would not raise but abort the process.
        if target.major < 9 and "mosaic_gpu" in lowered.as_text():
            raise ValueError(f"Mosaic kernels need compute capability 9.0 or newer; {target.device_kind} has less")
        # XLA takes its flags by name. Whatever the process has for programs on the CPU, kernels are optimized.
        options: dict[str, Any] = {"xla_backend_optimization_level": 3}
        if dump_to:
            # A pattern: newer versions dump PTX only where it asks for it.
            options |= {"xla_dump_to": os.fspath(dump_to), "xla_dump_emitter_re": "ptx"}
        with _without_cache(), _mosaic_dumps(dump_to):
            return lowered.compile(compiler_options=options)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    # JAX writes programs for absent devices to its persistent cache, but can not load them without a device: it warns,
    # and compiles again. Where there is one, a program out of the cache would leave no dump.
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
            yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _mosaic_dumps(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    # Mosaic kernels are compiled by a library of their own, which knows nothing of XLA's flags.
    name = "MOSAIC_GPU_DUMP_TO"
    if folder is None or name in os.environ:
        yield
        return
    os.environ[name] = os.fspath(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _placed(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if leaf.sharding is not None else leaf.update(sharding=where)
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=where, weak_type=aval.weak_type)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a compiled program needs, in bytes.

    Attributes:
        arguments: all arguments.
        outputs: all results, donated buffers included.
        alias: results that reuse an argument's buffer: what donation saved.
        temporaries: scratch memory that lives while the program runs.
    """

    arguments: int
    outputs: int
    alias: int
    temporaries: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Reads a compiled program's memory needs; works for any backend."""
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of an optimized program.

    Attributes:
        name: its name in the program, without `%`.
        opcode: `"fusion"`, `"copy"`, `"custom-call"`, …
        type: its result, as XLA writes it: `"bf16[32,128]{1,0}"`, or a tuple of such.
        nbytes: bytes of the largest array in its result.
        computation: the computation that it stands in; inside a fusion, only the fusion's root reaches memory.
        op_name: the path of the JAX operation that it comes from, or `""`.
        operands: names of its operands; of a `"parameter"` its number.
        attributes: what follows the operands, as XLA writes it.
        is_root: whether it is the result of its computation.
        in_entry: whether it stands at the top level of the program.
    """

    name: str
    opcode: str
    type: str
    nbytes: int
    computation: str
    op_name: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    in_entry: bool


# What moves data and computes nothing; `copy-start` is the asynchronous form of `copy`.
COPIES = ("copy", "copy-start", "transpose", "gather", "dynamic-slice")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
# The opcode is the first lower-case word that is followed by "(": layouts and index comments in a type never are.
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][a-z0-9\-]*)"
    r"\((?P<operands>(?:\([^()]*\)|[^()])*)\)(?P<attributes>.*)"
)
_OPERAND = re.compile(r"%(?P<name>[\w.\-]+)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<dims>[\d,]*)\]")
_OP_NAME = re.compile(r'op_name="(?P<path>[^"]*)"')


def entry_instructions(compiled: jax.stages.Compiled) -> list[Instruction]:
    """Lists what the program does at its top level, in the order of its schedule.

    On a GPU each `fusion`, `custom-call` and `copy` among them is a launch.
    """
    return [each for each in instructions(compiled) if each.in_entry]


def large_copies(compiled: jax.stages.Compiled, min_bytes: int, opcodes: Sequence[str] = COPIES) -> list[Instruction]:
    """Finds what copies a weight or a cache, wherever it stands in the optimized program.

    Args:
        compiled: a compiled program, of any backend.
        min_bytes: size of the result from which on it is reported.
        opcodes: which instructions count.

    Returns:
        The instructions, inside fusions too: a `gather` fused into its consumer still reads what it gathers.
    """
    return [each for each in instructions(compiled) if each.opcode in opcodes and each.nbytes >= min_bytes]


def instructions(compiled: jax.stages.Compiled) -> list[Instruction]:
    """Lists every instruction of an optimized program, computation by computation."""
    text = compiled.as_text()
    if text is None:
        raise ValueError("the backend gives no text of its compiled programs")
    found = []
    computation, in_entry = "", False
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation, in_entry = match["name"], bool(match["entry"])
        elif match := _INSTRUCTION.match(line):
            op_name = _OP_NAME.search(line)
            operands = match["operands"]
            instruction = Instruction(
                name=match["name"],
                opcode=match["opcode"],
                type=match["type"],
                nbytes=max((nbytes for _, nbytes in arrays(match["type"])), default=0),
                computation=computation,
                op_name=op_name["path"] if op_name else "",
                operands=(operands,) if match["opcode"] == "parameter" else tuple(_OPERAND.findall(operands)),
                attributes=match["attributes"],
                is_root=bool(match["root"]),
                in_entry=in_entry,
            )
            found.append(instruction)
    return found


def arrays(type: str) -> list[tuple[int, int]]:
    """Elements and bytes of each array in an instruction's type."""
    return [(_size(array), _nbytes(array)) for array in _ARRAY.finditer(type)]


def _size(array: re.Match[str]) -> int:
    return math.prod(int(dim) for dim in array["dims"].split(",") if dim)


def _nbytes(array: re.Match[str]) -> int:
    # A boolean takes a byte; the first number in any other dtype is its width: bf16, f8e4m3fn, s4, c64.
    return math.ceil(_size(array) * int(array["bits"] or 8) / 8)
