"""Rotary embedding of queries and keys, quantization of keys and values, and their write into the pages, in one."""

from pallas_kernels.rotary_page_write.api import Written, rotary_page_write
from pallas_kernels.rotary_page_write.reference import quantize

__all__ = ["Written", "quantize", "rotary_page_write"]
