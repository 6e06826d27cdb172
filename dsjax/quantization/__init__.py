"""Quantized leaves: arrays stored in few bits, with what it takes to read them back."""

from dsjax.quantization.leaf import SCHEMES, QuantizedArray, Scheme

__all__ = ["SCHEMES", "QuantizedArray", "Scheme"]
