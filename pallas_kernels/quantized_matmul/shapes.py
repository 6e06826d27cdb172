"""Named real shapes: the products of a layer of known models, and larger ones that only bandwidth bounds."""

from pallas_kernels.few_row_matmul.shapes import MODELS, Product
from pallas_kernels.quantized_matmul.formats import Format

PRODUCTS = {
    **{f"llama-3.1-8b {name}": MODELS["llama-3.1-8b"][name] for name in ("qkv", "out", "gate_up", "down")},
    **{f"llama-3.3-70b {name}": MODELS["llama-3.3-70b"][name] for name in ("qkv", "out", "gate_up", "down")},
    "8192 x 8192": Product(8192, 8192),
    "8192 x 16384": Product(8192, 16384),
    "smollm2-135m down": MODELS["smollm2-135m"]["down"],
}
# The formats that people hold, with the dtype of their scales.
FORMATS = {
    "int4": (Format("int4", 128, zero=8), "bfloat16"),
    "q4_0": (Format("int4", 32, zero=8), "float16"),
    "int8": (Format("int8"), "float32"),
    "fp8": (Format("e4m3"), "float32"),
    "fp8 blocks": (Format("e4m3", 128, rows=128), "float32"),
    "fp6": (Format("e3m2"), "float32"),
    "nf4": (Format("nf4", 64), "bfloat16"),
    "mxfp4": (Format("e2m1", 32), "uint8"),
    "nvfp4": (Format("e2m1", 16), "float8_e4m3fn"),
}
