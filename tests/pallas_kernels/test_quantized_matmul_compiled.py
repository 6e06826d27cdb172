"""Machine code of the quantized product: spills, instructions for each weight; and what its PTX means."""

import collections
import functools
import itertools
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.compat import pltriton
from pallas_kernels.dispatch import Gpu
from pallas_kernels.quantized_matmul import (
    ELEMENTS,
    Format,
    assembly,
    quantized_matmul,
    shapes,
    tiles,
    to_tiles,
    triton,
)
from pallas_kernels.resources import read_resources
from pallas_kernels.targets import TARGETS, compile_for, cuda_tools, entry_instructions


def structs(name, product):
    """Tiles of a weight, and their format."""
    format, scale_dtype = shapes.FORMATS[name]
    out, inner = product.out, product.inner
    stored = ELEMENTS[format.element]
    values = jax.ShapeDtypeStruct((out, inner * stored.bits // 8), stored.dtype)
    scales = jax.ShapeDtypeStruct(format.scales_shape(out, inner), scale_dtype)
    found = []

    def lay_out(values, scales):
        arrays = to_tiles(values, scales, format=format)
        found.append(arrays[-1])
        return arrays[:2]

    return (*jax.eval_shape(lay_out, values, scales), found[0])


def compiled(name, product, rows, target, folder):
    """What the kernel takes, the instructions of its loop, its PTX, and its configuration."""
    values, scales, format = structs(name, product)
    x = jax.ShapeDtypeStruct((rows, product.inner), jnp.bfloat16)
    options = {"activation": product.activation, "partial": product.partial}
    program = compile_for(
        lambda *arrays: quantized_matmul(*arrays, format=format, **options),
        *(x, values, scales),
        target=target,
        dump_to=folder,
    )
    ((kernel, needs),) = read_resources(program, folder).items()
    assert kernel == triton.OP
    assert [each.opcode for each in entry_instructions(program) if each.opcode != "parameter"] == ["custom-call"]
    (ptx,) = (path for path in pathlib.Path(folder).glob("*.ptx") if triton.OP in path.read_text())
    return needs, ptx, sizes(name, product, rows, TARGETS[target])


def unit_of(name, product):
    format = shapes.FORMATS[name][0]
    width = tiles.tile_width(format, product.inner)
    return width and tiles.unit_of(format, width)


def sizes(name, product, rows, target):
    format, unit = shapes.FORMATS[name][0], unit_of(name, product)
    gated = product.activation is not None
    return triton.block_sizes(
        rows,
        product.out // (2 if gated else 1),
        units=product.inner // unit,
        unit_bytes=unit * format.bits // 8,
        unit=unit,
        gated=gated,
        partial=product.partial,
        gpu=Gpu(target.device_kind, target.capability, target.cores),
    )


EIGHT = "llama-3.1-8b "
# Format, product, rows, and the most integer instructions a weight, where the format is decoded at the speed of bytes.
COMPILED = [
    ("int4", EIGHT + "out", 1, 1.2),
    ("int4", EIGHT + "down", 64, 1.5),
    ("int4", EIGHT + "gate_up", 64, 1.5),
    ("int4", EIGHT + "down", 512, None),
    ("q4_0", EIGHT + "qkv", 1, 1.4),
    ("int8", EIGHT + "out", 1, 1.8),
    ("fp8", EIGHT + "out", 1, 2.3),
    ("fp8 blocks", EIGHT + "down", 32, None),
    ("fp6", EIGHT + "out", 1, 2.7),
    ("nf4", EIGHT + "out", 64, None),
    ("mxfp4", EIGHT + "out", 1, 2.0),
    ("nvfp4", EIGHT + "gate_up", 16, None),
]
INTEGER = {
    "IADD3",
    "IMAD",
    "ISETP",
    "LEA",
    "LOP3",
    "MOV",
    "PRMT",
    "SEL",
    "SHF",
    "VIADD",
    "VIMNMX",
    "I2F",
    "F2F",
    "I2FP",
}


@pytest.mark.parametrize(
    ("target", "name", "product", "rows", "most"),
    [("h200", *case) for case in COMPILED] + [("a100", *case) for case in COMPILED[2::3]],
)
def test_compiled(gpu_compiler, tmp_path, target, name, product, rows, most):
    """One launch, nothing spilled, on the tensor cores, the weight in pieces of 16 bytes, few instructions a weight."""
    product = shapes.PRODUCTS[product]
    needs, ptx, config = compiled(name, product, rows, target, tmp_path)
    assert needs.spill_bytes == 0
    expected = "wgmma" if target == "h200" and config["swap"] else "mma.sync"
    assert needs.tensor_core_instructions[expected] > 0
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+|\d+)", ptx.read_text())
    assert sum(int(size, 0) == 16 for size in copies) >= config["num_stages"] - 1
    if most is not None:
        weights = unit_of(name, product) * config["block_n"] * (2 if product.activation else 1)
        found = loop_instructions(ptx)
        assert sum(found[each] for each in INTEGER) / (weights / (32 * config["num_warps"])) <= most


def loop_instructions(ptx):
    """The instructions of the longest loop, by name."""
    nvdisasm = cuda_tools("nvdisasm")
    if not nvdisasm:
        pytest.skip("there is no nvdisasm (wheel nvidia-cuda-nvdisasm)")
    arch = re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)[0]
    cubin = ptx.with_suffix(".cubin")
    subprocess.run([cuda_tools("ptxas")[0], f"-arch={arch}", str(ptx), "-o", str(cubin)], check=True)
    text = subprocess.run([nvdisasm[0], "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    labels, found = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.*?);", line):
            found.append(instruction[1])
    loops = [(0, 0)]
    for end, instruction in enumerate(found):
        target = re.search(r"^BRA.*?(\.L_\w+)", instruction)
        if target and labels.get(target[1], end) < end:
            loops.append((labels[target[1]], end + 1))
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return collections.Counter(re.split(r"[.\s]", each)[0] for each in found[start:end])


@pytest.mark.parametrize("target", ["a100", "l4", "h200", "b200"])
def test_sizes_for_real_shapes(target):
    target = TARGETS[target]
    for name, product, rows in itertools.product(shapes.FORMATS, shapes.PRODUCTS.values(), (1, 16, 32, 64, 200, 512)):
        unit = unit_of(name, product)
        if unit is None:
            continue
        config, format = sizes(name, product, rows, target), shapes.FORMATS[name][0]
        tile = config["block_n"] * (2 if product.activation else 1)
        ring = unit * (format.bits * tile // 8 + 2 * config["block_m"])
        assert ring * config["num_stages"] <= target.shared_memory_per_block
        assert config["num_stages"] >= 2
        columns = product.out // (2 if product.activation else 1)
        programs = -(-columns // config["block_n"]) * -(-rows // config["block_m"]) * config["splits"]
        assert programs >= 0.8 * target.cores or product.out < 4096 or config["block_n"] <= 64
        assert product.partial or config["splits"] == 1


def emulate(text, constraints, args, pack, dtype):
    """What a piece of PTX makes of host arrays, two elements of 16 bits to a register."""
    inputs = [np.ascontiguousarray(arg).view(np.uint16).reshape(-1, pack // 2, 2) for arg in args]
    words = [(each[..., 1].astype(np.uint32) << 16) | each[..., 0] for each in inputs]
    outputs = constraints.count("=")
    registers = {f"${outputs + i}": each for i, each in enumerate(np.concatenate(words, axis=1).T)}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def byte(a, b, selector):
        pair = (np.uint64(b) << np.uint64(32)) | np.uint64(a)
        found = (pair >> (np.uint64(8) * (selector & 7).astype(np.uint64))) & np.uint64(0xFF)
        return np.where(selector & 8, np.where(found & np.uint64(0x80), 0xFF, 0), found).astype(np.uint32)

    def permute(a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, selector)
        return sum(byte(a, b, selector >> np.uint32(4 * i) & 15) << np.uint32(8 * i) for i in range(4))

    def logic(a, b, c, table):
        terms = [((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)) for i in range(8)]
        return functools.reduce(np.bitwise_or, [term for i, term in enumerate(terms) if table >> np.uint32(i) & 1])

    operations = {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "shr": lambda a, b: a >> b,
        "shl": lambda a, b: a << b,
        "lop3": logic,
        "prmt": permute,
    }
    for line in filter(None, map(str.strip, text.strip("{}").split(";"))):
        if not line.startswith(".reg"):
            name, operands = line.split(" ", 1)
            target, *sources = (each.strip() for each in operands.split(","))
            registers[target] = operations[name.split(".")[0]](*map(value, sources))
    found = np.stack(np.broadcast_arrays(*(registers[f"${i}"] for i in range(outputs)), words[0][:, 0])[:-1], axis=1)
    return np.ascontiguousarray(found.astype(np.uint32)).view(np.uint16).reshape(args[0].shape).view(dtype)


def test_ptx_decodes_as_the_portable_form_does(monkeypatch, rng):
    """On random words: each bit where `tiles.move` puts it, and each code's number from the table."""

    def elementwise_inline_asm(asm, *, args, constraints, pack, result_shape_dtypes):
        args = [np.asarray(arg) for arg in args]
        return [jnp.asarray(emulate(asm, constraints, args, pack, result_shape_dtypes[0].dtype))]

    monkeypatch.setattr(pltriton, "elementwise_inline_asm", elementwise_inline_asm)
    words = [jnp.asarray(rng.integers(0, 2**16, (4, 32)), jnp.uint16) for _ in range(3)]
    for element, kind in ELEMENTS.items():
        format = Format(element)
        for plane in range(tiles.planes_of(format)):
            for targets, constant in (
                ([*range(kind.bits - 1), 15], 0),
                ([*range(5, 4 + kind.bits), 15], 0),
                (range(kind.bits), 0x4300),
            ):
                found = assembly.move(words, tiles.terms_of(element, plane, targets), constant, np.dtype(np.uint16))
                np.testing.assert_array_equal(found, tiles.move(words, element, plane, targets, constant))
    table = rng.normal(size=16).astype(ml_dtypes.bfloat16)
    for plane in range(4):
        found = assembly.look_up(words[0], plane, table)
        np.testing.assert_array_equal(found, table[np.asarray(words[0]) >> (4 * plane) & 15])
