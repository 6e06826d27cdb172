"""Product of rows with a weight in 8 to 4 bits, decoded on its way to the tensor cores."""

from pallas_kernels.quantized_matmul.api import MAX_ROWS, quantized_matmul
from pallas_kernels.quantized_matmul.formats import ELEMENTS, Format
from pallas_kernels.quantized_matmul.reference import dequantize
from pallas_kernels.quantized_matmul.tiles import from_tiles, tile_width, to_tiles

__all__ = ["ELEMENTS", "MAX_ROWS", "Format", "dequantize", "from_tiles", "quantized_matmul", "tile_width", "to_tiles"]
