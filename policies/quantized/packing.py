"""Codes of weights as checkpoints pack them, and as leaves do: numpy, a few rows at a time.

The packing of leaves is told in `pallas_kernels.quantized_matmul.formats`.
"""

from collections.abc import Callable, Iterator

import numpy as np

from policies.quantized.format import Parts
from policies.sources.files import aligned_empty

_RUN = 32  # weights that leaves pack together
_PIECE = 2**20  # weights unpacked at a time
# Columns 0, 2, 4, 6, 1, 3, 5, 7 of eight lie in a word of AWQ's from its low bits up.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


def low_first(packed: np.ndarray) -> np.ndarray:
    """Codes `[..., 2n]` from bytes `[..., n]`, the low nibble first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def high_first(packed: np.ndarray) -> np.ndarray:
    """Codes `[..., 2n]` from bytes `[..., n]`, the high nibble first."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def of_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[..., n * 32 / bits]` of 4 or 8 bits from words `int32[..., n]`, from the low bits up."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return low_first(packed) if bits == 4 else packed


def of_awq_words(words: np.ndarray) -> np.ndarray:
    """Codes `[..., 8n]` from words `int32[..., n]` in AWQ's order."""
    codes = of_words(words, 4).reshape(*words.shape, 8)
    return codes[..., _AWQ].reshape(*words.shape[:-1], -1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `uint8[..., in]` as leaves have them, `uint8[..., in * bits / 8]`."""
    if bits == 8:
        return codes
    runs = codes.reshape(*codes.shape[:-1], -1, _RUN)
    low = runs & 15
    parts = [low[..., : _RUN // 2] | low[..., _RUN // 2 :] << 4]
    if bits == 6:
        first, second, third, last = np.split(runs >> 4, 4, axis=-1)
        parts.append(first | second << 2 | third << 4 | last << 6)
    return np.concatenate(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def rows_of(
    rows: int, columns: int, bits: int, codes: Callable[[slice], np.ndarray], order: np.ndarray | None = None
) -> np.ndarray:
    """The packed codes of a whole matrix; unpacked ones exist of a few rows at a time.

    Args:
      rows: of the matrix.
      columns: of the matrix; a multiple of 32 unless there are 8 bits.
      bits: of a code, 4, 6 or 8.
      codes: gives those of some rows, `uint8[some, columns]`.
      order: of the columns; `None` leaves them.
    """
    values = aligned_empty((rows, columns * bits // 8), np.dtype(np.uint8))
    for part in _pieces(rows, columns):
        some = codes(part)
        values[part] = packed(some if order is None else some[:, order], bits)
    return values


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    # Whole words of AWQ's, which hold eight rows.
    step = max(8, _PIECE // max(columns, 1) // 8 * 8)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def signed(codes: np.ndarray) -> np.ndarray:
    """The inverse of `unsigned`, of 8 bits."""
    codes ^= 0x80
    return codes.view(np.int8)


def unsigned(integers: np.ndarray, bits: int = 8) -> np.ndarray:
    """Integers `int8` counted from the smallest one of so many bits, `uint8`, in the same memory."""
    codes = integers.view(np.uint8)
    codes += np.uint8(2 ** (bits - 1))  # modulo 256 this is what signed integers would give
    return codes


def aligned(array: np.ndarray) -> np.ndarray:
    """A contiguous copy that a device can take over."""
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


def permutation_of(parts: Parts, part: str, columns: int, group: int | None) -> np.ndarray | None:
    """The order of columns that puts those of a group side by side; `None` if they are.

    Args:
      parts: of the weight.
      part: the one with the number of the group of each column.
      columns: how many there are.
      group: how many of them are in one.

    Raises:
      CheckpointError: they are not as many in every group.
    """
    groups, size = parts.require(part, "I32", (columns,)).read(), group or columns
    wanted = np.arange(columns, dtype=np.int32) // size
    if np.array_equal(groups, wanted):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], wanted):
        raise parts.error(f"its '{part}' does not have {size} inputs in every group")
    return order
