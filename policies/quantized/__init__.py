"""Quantized checkpoints of Hugging Face's as they are, by `quant_method`: codes and scales of the file, packed anew."""

from policies.quantized.methods import Assembled as Assembled
from policies.quantized.methods import assemble as assemble
from policies.quantized.methods import check_config as check_config
