"""What a compiled program asks of the GPU: its launches, the CUDA graphs that they stand in, and the bytes they move.

XLA records consecutive launches in a CUDA graph, so that the host starts them as one. A loop, whatever its length,
stands outside of graphs and cuts them in two, and so does a conditional with a loop in one of its branches.

    compiled = compile_for(step, params, state, target="h200", donate_argnums=1, dump_to=folder)
    schedule = read_schedule(folder)
    assert (schedule.cuda_graphs, schedule.outside_graphs) == (1, [])
    assert sum(traffic(compiled, schedule).values()) <= 1.05 * (weight_bytes + cache_bytes)
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import jax

from pallas_kernels.targets import Instruction, arrays, instructions


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, a copy or a call of a library.

    Attributes:
        kind: what XLA calls it: `"kCustomKernel"`, `"kCopy"`, `"kCublasLtMatmul"`, …
        kernel: name of the machine code, if it is a kernel.
        instruction: the instruction of the program that it comes from.
        in_graph: whether it is part of a CUDA graph.
        loops: the loops round it by name, outermost first.
    """

    kind: str
    kernel: str
    instruction: str
    in_graph: bool
    loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What runs when a program does.

    Attributes:
        launches: in order, those of a loop's body once, where each conditional takes the branch with the fewest.
        most_launches: how many there are where each takes the branch with the most.
        cuda_graphs: how many CUDA graphs the launches are recorded in.
        outside_graphs: what the host starts one by one: launches, loops and conditionals by name.
        loops: loops by name, inside graphs too.
    """

    launches: list[Launch]
    most_launches: int
    cuda_graphs: int
    outside_graphs: list[str]
    loops: list[str]


@dataclasses.dataclass
class _Thunk:
    kind: str
    kernel: str
    instruction: str
    sections: list[list["_Thunk"]]


# What holds others, and launches nothing by itself.
_CONTAINERS = {"kCommandBuffer", "kWhile", "kConditional", "kSequential", "kAsyncStart", "kAsyncDone"}

_THUNK = re.compile(r"^(?P<indent> *)(?P<id>\d+): (?P<kind>k\w+) +\[[^\]]*\] *(?P<rest>.*)")
_EMPTY = re.compile(r"^(?P<indent> *)No thunks\.")
_SECTION = re.compile(r"(?:condition|body|branch_\d+|\w+_branch):? *$")
_ANNOTATION = re.compile(r'profile_annotation: "(?P<name>[^"]*)"\s+thunk_id: (?P<id>\d+)')


def read_schedule(folder: str | os.PathLike[str]) -> Schedule:
    """Reads the launches of a program from what `compile_for` dumped.

    Args:
        folder: the `dump_to` of one program.

    Raises:
        FileNotFoundError: no program for a GPU was dumped there.
    """
    thunks = _read_thunks(pathlib.Path(folder))
    every = list(_walk(thunks))
    return Schedule(
        launches=_executed(thunks, False, (), min),
        most_launches=len(_executed(thunks, False, (), max)),
        cuda_graphs=sum(each.kind == "kCommandBuffer" for each in every),
        outside_graphs=[each.instruction for each in _outside(thunks)],
        loops=[each.instruction for each in every if each.kind == "kWhile"],
    )


def _read_thunks(folder: pathlib.Path) -> list[_Thunk]:
    def text(*suffixes: str) -> str:
        for suffix in suffixes:
            if found := sorted(folder.glob(f"*.{suffix}.txt")):
                return found[-1].read_text()
        raise FileNotFoundError(f"{folder} holds no *.{suffixes[-1]}.txt: was a program for a GPU dumped there?")

    names = {match["id"].zfill(3): match["name"] for match in _ANNOTATION.finditer(text("thunk_metadata"))}
    # The first is only there if it differs from the second.
    sequence = text("thunk_sequence_after_thunk_passes", "thunk_sequence")
    top = _Thunk("", "", "", [[]])
    stack = [(-1, top)]  # thunks that are open, with their indentation
    begins = False  # whether the next thunk is the first of its section
    for line in sequence.splitlines():
        if match := _THUNK.match(line) or _EMPTY.match(line):
            indent = len(match["indent"])
            while stack[-1][0] >= indent:
                stack.pop()
            sections = stack[-1][1].sections
            if begins or not sections:
                sections.append([])
            if "kind" in match.groupdict():
                kernel = match["rest"].split(" grid:")[0] if " grid:" in match["rest"] else ""
                thunk = _Thunk(match["kind"], kernel, names.get(match["id"], match["kind"]), [])
                sections[-1].append(thunk)
                stack.append((indent, thunk))
        begins = bool(_SECTION.search(line))
    return top.sections[0]


def _walk(thunks: list[_Thunk]) -> Iterator[_Thunk]:
    for each in thunks:
        yield each
        for section in each.sections:
            yield from _walk(section)


def _outside(thunks: list[_Thunk]) -> Iterator[_Thunk]:
    for each in thunks:
        if each.kind != "kCommandBuffer":
            yield each
            for section in each.sections:
                yield from _outside(section)


def _executed(thunks: list[_Thunk], in_graph: bool, loops: tuple[str, ...], choose) -> list[Launch]:
    found = []
    for each in thunks:
        if each.kind not in _CONTAINERS:
            found.append(Launch(each.kind, each.kernel, each.instruction, in_graph, loops))
        within = (*loops, each.instruction) if each.kind == "kWhile" else loops
        inside = in_graph or each.kind == "kCommandBuffer"
        sections = [_executed(section, inside, within, choose) for section in each.sections]
        if each.kind == "kConditional":
            sections = [choose(sections, key=len)]
        found += [launch for section in sections for launch in section]
    return found


def traffic(compiled: jax.stages.Compiled, schedule: Schedule, *, parted: int | None = None) -> dict[str, int | None]:
    """Adds up what the launches of a program read and write in device memory.

    Of a buffer that a launch only gathers or slices from, it counts what is picked; of one that it updates in place,
    what is written. A kernel that updates a buffer in place is taken to write what its other operands bring.

    Args:
        compiled: the program.
        schedule: of the same program.
        parted: size in bytes from which on a buffer that several kernels take is read by each in part, and counts once:
            the pages of a cache, of which one kernel reads what prompts need and another what single tokens need.

    Returns:
        Bytes by the name of the launched instruction, `None` for those in a loop that does not tell how often it runs.
    """
    program = _Program(instructions(compiled), sys.maxsize if parted is None else parted)
    found = {}
    for name, loops in {launch.instruction: launch.loops for launch in schedule.launches}.items():
        trips = [_KNOWN_TRIPS.search(program.by_name[loop].attributes) for loop in loops]
        moved = program.traffic(program.by_name[name])
        found[name] = math.prod(int(known[1]) for known in trips if known) * moved if all(trips) else None
    return found


_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What a fusion computes element by element, and so only where it is picked.
_PASSED_THROUGH = {"add", "bitcast", "convert", "copy", "multiply", "reshape", "select", "subtract", "transpose"}
_PICKS = {"gather", "dynamic-slice", "slice"}
_UPDATES = {"dynamic-update-slice", "scatter"}


class _Program:
    def __init__(self, found: list[Instruction], parted: int):
        self.parted = parted
        self.taken: set[tuple[str, int]] = set()  # buffers of that size that a kernel has read
        self.by_name = {each.name: each for each in found}
        self.needed: dict[str, int] = {}
        self.computations = collections.defaultdict(dict)
        self.users = collections.defaultdict(list)
        for each in found:
            self.computations[each.computation][each.name] = each
            if each.opcode != "parameter":
                for operand in each.operands:
                    self.users[each.computation, operand].append(each)

    def traffic(self, instruction: Instruction) -> int:
        """Bytes that one launch reads and writes."""
        operands = [self.by_name[name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            body = self.computations[instruction.attributes.split("calls=")[1].split(",")[0].lstrip("%")]
            numbers = {each.operands[0]: each for each in body.values() if each.opcode == "parameter"}
            read = sum(self._read(numbers[str(i)]) for i in range(len(operands)))
            return read + sum(self._written(body, each) for each in body.values() if each.is_root)
        if instruction.opcode == "custom-call":
            return self._called(instruction, operands)
        if instruction.opcode in _PICKS:
            return 2 * _total(instruction)
        if instruction.opcode in _UPDATES:
            return 2 * _updated(instruction, operands)
        return sum(map(_total, operands)) + _total(instruction)

    def _read(self, parameter: Instruction) -> int:
        size, nbytes = map(sum, zip(*arrays(parameter.type), strict=True))
        return nbytes * self._needed(parameter) // max(size, 1)

    def _needed(self, instruction: Instruction) -> int:
        """Elements of an instruction inside a fusion that are computed or read."""
        if instruction.name not in self.needed:
            size = sum(elements for elements, _ in arrays(instruction.type))
            users = self.users[instruction.computation, instruction.name]
            needed = sum(self._needed_by(user, instruction, size) for user in users)
            self.needed[instruction.name] = size if instruction.is_root else min(needed, size)
        return self.needed[instruction.name]

    def _needed_by(self, user: Instruction, instruction: Instruction, size: int) -> int:
        if user.opcode in _UPDATES and instruction.name in _buffers(user):
            return 0
        picks = user.opcode in _PICKS and user.operands[0] == instruction.name
        alike = user.opcode in _PASSED_THROUGH and sum(elements for elements, _ in arrays(user.type)) == size
        return self._needed(user) if picks or alike else size

    def _written(self, body: dict[str, Instruction], root: Instruction) -> int:
        if root.opcode == "tuple":
            return sum(self._written(body, body[name]) for name in root.operands)
        if root.opcode in ("bitcast", "get-tuple-element"):
            return self._written(body, body[root.operands[0]])
        if root.opcode in _UPDATES:
            return _updated(root, [body[name] for name in root.operands])
        return _total(root)

    def _called(self, call: Instruction, operands: list[Instruction]) -> int:
        aliases = re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", call.attributes)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", aliases[1]) if aliases else []
        updated = {int(operand) for _, operand in pairs}
        inputs = {self._buffer(each): _total(each) for i, each in enumerate(operands) if i not in updated}
        large = {buffer for buffer, nbytes in inputs.items() if nbytes >= self.parted}
        read = sum(nbytes for buffer, nbytes in inputs.items() if buffer not in large & self.taken)
        self.taken |= large
        results = [nbytes for _, nbytes in arrays(call.type)]
        if 'custom_call_target="__cublas' in call.attributes:
            results = results[:1]  # the second is scratch memory
        written = sum(results) - sum(results[int(result or 0)] for result, _ in pairs)
        return read + written + min(sum(_total(operands[i]) for i in updated), read)

    def _buffer(self, instruction: Instruction) -> tuple[str, int]:
        """What tells buffers apart: the instruction that made it, and its place among the results."""
        while instruction.opcode == "bitcast":
            instruction = self.by_name[instruction.operands[0]]
        if instruction.opcode == "get-tuple-element":
            return instruction.operands[0], int(instruction.attributes.split("index=")[1].split(",")[0])
        return instruction.name, 0


def _total(instruction: Instruction) -> int:
    return sum(nbytes for _, nbytes in arrays(instruction.type))


def _buffers(update: Instruction) -> tuple[str, ...]:
    """What a `dynamic-update-slice`, or a `scatter` of one array or many, writes into."""
    return update.operands[: (len(update.operands) - 1) // 2 if update.opcode == "scatter" else 1]


def _updated(update: Instruction, operands: list[Instruction]) -> int:
    """Bytes that it writes."""
    if update.opcode == "scatter":
        return sum(map(_total, operands[len(operands) // 2 + 1 :]))
    return _total(operands[1])
