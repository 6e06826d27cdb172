"""Pickles of weights, read as data: nothing that a pickle names is ever imported or called.

A pickle is a program for a small stack machine. This one knows the instructions that build dictionaries, lists, tuples,
strings and numbers. What a pickle wants to call is looked up in a table of stand-ins; anything else ends the reading.
Opcodes come from the standard library's `pickletools`, which executes none of them.
"""

import pickletools
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.errors import CheckpointError

_MARK = object()
_PUSHED = frozenset(
    """
    BINFLOAT BININT BININT1 BININT2 BINBYTES BINSTRING BINUNICODE BINUNICODE8 INT LONG LONG1 LONG4 SHORT_BINBYTES
    SHORT_BINSTRING SHORT_BINUNICODE UNICODE
    """.split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Stack(list):
    """The machine's stack; taking from an empty one is an error like any other of a damaged pickle."""

    def above_mark(self) -> list[Any]:
        """Everything above the topmost mark, taken off with it."""
        for i in range(len(self) - 1, -1, -1):
            if self[i] is _MARK:
                above = self[i + 1 :]
                del self[i:]
                return above
        raise ValueError("a mark is missing")


def read_pickle(
    data: bytes,
    stand_ins: Mapping[str, Any],
    persistent: Callable[[Any], Any],
) -> Any:
    """What a pickle describes, in dictionaries, lists, tuples, numbers, strings and stand-ins.

    Args:
      data: the pickle.
      stand_ins: by `module.name` what a global becomes; functions among them are called where the pickle calls theirs.
      persistent: what a persistent id becomes.

    Raises:
      CheckpointError: the pickle names another global (the message has it), or is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in strings, which damage brings
            return _run(data, stand_ins, persistent)
    except (LookupError, MemoryError, OverflowError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its pickle is damaged ({error}); fetch the file again") from error


def _run(data: bytes, stand_ins: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    stack, memo = _Stack(), {}

    def admitted(name: str) -> Any:
        if name not in stand_ins:
            raise CheckpointError(
                f"its pickle asks for {name}, which weights do not need and which is never run; convert the file to "
                "safetensors where you trust it (safetensors.torch.save_file)"
            )
        return stand_ins[name]

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            continue
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "POP":
            stack.pop()
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(stack.above_mark()))
        elif name in ("APPENDS", "ADDITEMS"):
            items = stack.above_mark()
            _of_type(stack[-1], list).extend(items)
        elif name == "APPEND":
            item = stack.pop()
            _of_type(stack[-1], list).append(item)
        elif name == "SETITEMS":
            items = stack.above_mark()
            _set_items(stack[-1], items[::2], items[1::2])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key], [value])
        elif name == "GLOBAL":
            stack.append(admitted(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(admitted(f"{_of_type(module, str)}.{_of_type(attribute, str)}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if not callable(function):
                raise ValueError(f"it calls a {type(function).__name__}")
            stack.append(function(*_of_type(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            # Attributes of anything else, such as the version numbers on a module's state dict, are left out.
            if type(stack[-1]) is types.SimpleNamespace:
                vars(stack[-1]).update({_of_type(key, str): value for key, value in _of_type(state, dict).items()})
        elif name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        else:
            raise CheckpointError(
                f"its pickle uses the instruction {name}, which weights do not need; convert the file to safetensors "
                "where you trust it (safetensors.torch.save_file)"
            )
    raise ValueError("it does not end")


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} is expected where a {type(value).__name__} is")
    return value


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    for key, value in zip(keys, values, strict=True):
        # Only these: the hash of a tuple nested deep enough would end the process.
        if type(key) not in (str, int, bool, float, type(None)):
            raise ValueError(f"a {type(key).__name__} as key of a dictionary")
        _of_type(target, dict)[key] = value
