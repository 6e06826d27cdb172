"""Quantized leaves: arrays stored in few bits, with what it takes to read them back."""

from dsjax.quantization.leaf import QuantizedArray
from dsjax.quantization.recipe import Recipe, quantize
from dsjax.quantization.rounding import quantize_array
from dsjax.quantization.schemes import SCHEMES, Scheme, scheme

__all__ = ["SCHEMES", "QuantizedArray", "Recipe", "Scheme", "quantize", "quantize_array", "scheme"]
