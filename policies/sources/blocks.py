"""GGUF's block formats as quantized leaves: from a file's blocks, and from a plain matrix on the way to the device."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.quantization.leaf import Scheme
from policies.base import Shape
from policies.sources.files import aligned_empty

KINDS = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_PIECE = 2**20  # weights quantized at a time


def leaf_of_blocks(shape: Shape, scheme: Scheme, pieces: Iterable[np.ndarray]) -> QuantizedArray:
    """A quantized leaf of numpy arrays.

    Args:
      shape: of the weight; its last axis is a multiple of the scheme's group.
      scheme: a name in `KINDS`.
      pieces: the blocks as llama.cpp lays them out, as bytes, in order and some at a time.
    """
    *rows, columns = shape
    assert scheme.group_size is not None
    nbytes = GGML_QUANT_SIZES[KINDS[scheme.name]][1]
    floats = 2 if scheme.has_minimum else 1
    number = np.dtype(np.int8 if scheme.bits == 8 else np.uint8)
    block = np.dtype([("floats", np.float16, (floats,)), ("values", number, (nbytes - 2 * floats,))])
    # Any: the leaf's components are numpy arrays until they are put on a device.
    values: Any = aligned_empty((*rows, columns * scheme.bits // 8), number)
    scales: Any = [aligned_empty((*rows, columns // scheme.group_size), np.dtype(np.float16)) for _ in range(floats)]
    begin = 0
    for piece in pieces:
        blocks = piece.reshape(-1).view(block)
        end = begin + len(blocks)
        values.reshape(-1, nbytes - 2 * floats)[begin:end] = blocks["values"]
        for i, part in enumerate(scales):
            part.reshape(-1)[begin:end] = blocks["floats"][:, i]
        begin = end
    return QuantizedArray(values, scales[0], scales[1] if floats == 2 else None, scheme, np.dtype(np.float32))


def quantize_matrix(matrix: np.ndarray, name: str) -> QuantizedArray:
    """A plain matrix in one of the block formats, rounded as llama.cpp rounds it.

    Args:
      matrix: floating, of two or more axes; the last one a multiple of the scheme's group.
      name: the scheme.
    """
    rows = matrix.reshape(-1, matrix.shape[-1])
    step = max(1, _PIECE // rows.shape[1])

    def pieces() -> Iterator[np.ndarray]:
        for begin in range(0, len(rows), step):
            yield quantize(rows[begin : begin + step].astype(np.float32), KINDS[name])

    return leaf_of_blocks(matrix.shape, SCHEMES[name], pieces())
