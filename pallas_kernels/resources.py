"""What a compiled kernel takes of a multiprocessor: registers, spills, shared memory; and whether it uses tensor cores.

XLA and Mosaic hand out the PTX of every kernel; `ptxas` turns it into machine code once more and says what that needs.

    found = kernel_resources(attention, q, pages, lengths, target="h200")
    assert found["decode_split"].spill_bytes == 0
    assert found["prefill"].tensor_core_instructions["wgmma"] > 0
"""

import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.targets import Target, compile_for, cuda_tools


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel needs and uses.

    Attributes:
        registers: of a thread.
        spill_bytes: stored to and loaded from local memory for want of registers, in the machine code of a thread.
        shared_memory: of a block, in bytes, static and dynamic; what Triton keeps for itself included.
        tensor_core_instructions: how often each kind stands in the PTX: `"wgmma"` (Hopper), `"tcgen05.mma"`
            (Blackwell), `"mma.sync"`.
        sass: the same in the machine code (`"HGMMA"`, `"HMMA"`, `"UTCHMMA"`, …), or `None` where there is no
            `nvdisasm` (wheel `nvidia-cuda-nvdisasm`).
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    tensor_core_instructions: Mapping[str, int]
    sass: Mapping[str, int] | None


def kernel_resources(
    fn: Callable[..., Any], *args: Any, target: str | Target = "h200", **kwargs: Any
) -> dict[str, Resources]:
    """Compiles a function for a GPU that does not have to exist, and measures the Pallas kernels in it.

    Args:
        fn: holds Pallas-Triton or Mosaic kernels.
        *args: as `compile_for` takes them.
        target: a `Target` or its name.
        **kwargs: as `compile_for` takes them.

    Returns:
        Resources of each kernel by the name that it was given; of several kernels of one name, the next ones are called
        `name_1`, `name_2`, …

    Raises:
        RuntimeError: a Mosaic kernel was compiled in this process before, by something else: it is not compiled again.
    """
    with tempfile.TemporaryDirectory() as folder:
        return read_resources(compile_for(fn, *args, target=target, dump_to=folder, **kwargs), folder)


def read_resources(compiled: jax.stages.Compiled, folder: str | os.PathLike[str]) -> dict[str, Resources]:
    """Measures the Pallas kernels of a program, from what `compile_for` dumped.

    Args:
        compiled: the program.
        folder: the `dump_to` that it was compiled with.

    Returns:
        As `kernel_resources`.

    Raises:
        RuntimeError: as `kernel_resources`.
    """
    text = compiled.as_text()
    assert text is not None
    found: dict[str, Resources] = {}
    for name, resources in (*_triton(text, pathlib.Path(folder)), *_mosaic(text, pathlib.Path(folder))):
        number, unique = 0, name
        while unique in found:
            number += 1
            unique = f"{name}_{number}"
        found[unique] = resources
    return found


_TRITON = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?[,{] ?name = "(?P<name>[^"]+)"')
_MOSAIC = re.compile(r'custom_call_target="mosaic_gpu_v2".*?kernel_hash = "(?P<hash>[^"]+)"')
_ENTRY = re.compile(r"^\.(?:visible|weak) \.entry (?P<name>[\w$]+)\(", re.MULTILINE)
_LAUNCH = re.compile(r"kCustomKernel .*\] (?P<name>\S+) grid: .* shared_memory: (?P<shared>\d+) bytes")
_MOSAIC_SHARED = re.compile(r"dynamic_shared_memory_size %c(?P<bytes>\d+)_i32")
_MOSAIC_SUFFIX = "_mosaic_gpu_kernel"

# Mosaic compiles a kernel once in a process: what it needs is remembered here by the hash of the kernel.
_mosaic_kernels: dict[str, list[tuple[str, Resources]]] = {}


def _triton(text: str, folder: pathlib.Path) -> Iterator[tuple[str, Resources]]:
    names = {re.sub(r"\W", "_", match["name"]) for match in _TRITON.finditer(text)}
    if not names:
        return
    # XLA numbers kernels of one name.
    wanted = re.compile(f"(?P<name>{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?:_+\\d+)?")
    shared = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        shared |= {match["name"]: int(match["shared"]) for match in _LAUNCH.finditer(path.read_text())}
    for path in sorted(folder.glob("*.ptx"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]):
        ptx = path.read_text()
        entry = _ENTRY.search(ptx)
        if entry and (match := wanted.fullmatch(entry["name"])):
            yield match["name"], _measure(ptx, shared.get(entry["name"], 0))


def _mosaic(text: str, folder: pathlib.Path) -> Iterator[tuple[str, Resources]]:
    hashes = list(dict.fromkeys(match["hash"] for match in _MOSAIC.finditer(text)))
    dumped = []
    for path in sorted(folder.glob("*.ptx")):
        ptx = path.read_text()
        entry = _ENTRY.search(ptx)
        if entry and entry["name"].endswith(_MOSAIC_SUFFIX):
            shared = _MOSAIC_SHARED.search(path.with_suffix(".mlir-passes.log").read_text())
            name = entry["name"].removesuffix(_MOSAIC_SUFFIX)
            dumped.append((name, _measure(ptx, int(shared["bytes"]) if shared else 0)))
    # Nothing tells which file is whose, so the new kernels of one program are remembered together.
    new = [each for each in hashes if each not in _mosaic_kernels]
    if new and not dumped:
        raise RuntimeError(
            "a Mosaic kernel of this program was compiled in this process before, which Mosaic does once: call "
            "kernel_resources, or compile_for with dump_to, before anything else compiles it"
        )
    _mosaic_kernels.update({each: dumped for each in new})
    seen = []
    for each in hashes:
        if _mosaic_kernels[each] not in seen:
            seen.append(_mosaic_kernels[each])
            yield from _mosaic_kernels[each]


_REPORT = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stores": re.compile(r"(\d+) bytes spill stores"),
    "loads": re.compile(r"(\d+) bytes spill loads"),
    "shared": re.compile(r"(\d+) bytes smem"),
}
_PTX_TENSOR_CORE = re.compile(r"(?<![\w.])(wgmma(?=\.mma_async)|tcgen05\.mma(?=\.)|mma\.sync(?=\.))")
_SASS_TENSOR_CORE = re.compile(r"\b(?:UTC[A-Z]*|[A-Z]G?)MMA\b")


def _measure(ptx: str, dynamic_shared: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        said = _assemble(source, cubin)
        nvdisasm = cuda_tools("nvdisasm")
        sass = _run(nvdisasm[0], "-c", str(cubin)).stdout if nvdisasm else None
    report = {name: sum(map(int, pattern.findall(said))) for name, pattern in _REPORT.items()}
    return Resources(
        registers=report["registers"],
        spill_bytes=report["stores"] + report["loads"],
        shared_memory=report["shared"] + dynamic_shared,
        tensor_core_instructions=collections.Counter(_PTX_TENSOR_CORE.findall(ptx)),
        sass=None if sass is None else collections.Counter(_SASS_TENSOR_CORE.findall(sass)),
    )


def _assemble(source: pathlib.Path, cubin: pathlib.Path) -> str:
    arch = re.search(r"^\.target (\w+)", source.read_text(), re.MULTILINE)
    assert arch
    said = "there is no ptxas"
    # Mosaic writes PTX for the ptxas on the PATH, which may be newer than that of the wheels.
    for ptxas in cuda_tools("ptxas"):
        done = _run(ptxas, "-v", f"-arch={arch[1]}", str(source), "-o", str(cubin))
        said = done.stderr
        if done.returncode == 0:
            return said
    raise RuntimeError(f"ptxas does not take the PTX of a kernel: {said}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
