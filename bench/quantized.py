"""Products with quantized weights for `bench.kernels`: what is timed, its cost, and what else computes the same."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.problems import Matmul, random_array
from bench.timing import Contender, captured, chained, rotations
from pallas_kernels.few_row_matmul.shapes import Product
from pallas_kernels.quantized_matmul import ELEMENTS, dequantize, quantized_matmul, to_tiles
from pallas_kernels.quantized_matmul.shapes import FORMATS


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A product of rows with a weight of a named format.

    Attributes:
        product: of a layer.
        rows: of `x`.
        format: name in `FORMATS`.
    """

    product: Product
    rows: int
    format: str = "int4"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the codes and scales."""
        out, inner, *_ = self.product
        format, dtype = FORMATS[self.format]
        blocks, groups = format.scales_shape(out, inner)
        return out * inner * format.bits // 8 + blocks * groups * jnp.dtype(dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the weight, and of rows and result in 16 bits."""
        out, inner, activation, _ = self.product
        return self.weight_bytes + 2 * self.rows * (inner + (out // 2 if activation else out))

    @property
    def flops(self) -> int:
        return self.dense.flops

    @property
    def dense(self) -> Matmul:
        """The same product with a weight in bfloat16."""
        return Matmul(self.product, self.rows)

    def tiny(self) -> "Quantized":
        return dataclasses.replace(self, product=self.product._replace(out=64, inner=256), rows=min(self.rows, 2))

    def arrays(self, is_tiled: bool) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]], Any]:
        """Rows; values and scales that calls take in turn; and their format."""
        out, inner, *_ = self.product
        format, dtype = FORMATS[self.format]
        stored = ELEMENTS[format.element]
        tiled = []

        @jax.jit
        def make(codes):
            scale = jnp.full(format.scales_shape(out, inner), 2.0**-6)
            scales = jnp.full(scale.shape, 121, jnp.uint8) if dtype == "uint8" else scale.astype(dtype)
            values = lax.bitcast_convert_type(codes, stored.dtype)
            if is_tiled:
                values, scales, _, _, found = to_tiles(values, scales, format=format)
                tiled.append(found)
            return values, scales

        weights = [
            make(random_array(2 + i, (out, inner * format.bits // 8), jnp.int8))
            for i in range(rotations(self.weight_bytes))
        ]
        return random_array(1, (self.rows, inner), jnp.bfloat16), weights, tiled[0] if is_tiled else format


def kernel(problem: Quantized) -> Contender:
    x, weights, format = problem.arrays(is_tiled=True)
    *_, activation, partial = problem.product
    run = functools.partial(quantized_matmul, format=format, implementation="triton")

    def call(x, _, weight):
        return run(x, *weight, activation=activation, partial=partial)

    return chained(call, x, None, weights)


def xla(problem: Quantized) -> Contender:
    """Dequantized and multiplied, as XLA fuses it."""
    x, weights, format = problem.arrays(is_tiled=False)

    def call(x, _, weight):
        return lax.dot_general(x, dequantize(*weight, format=format, dtype=x.dtype), (((1,), (1,)), ((), ())))

    return chained(call, x, None, weights)


def torch_int4(problem: Quantized) -> Contender:
    """The four-bit product that torch itself has (`_weight_int4pack_mm`), in groups of 128; without an activation."""
    import torch

    out, inner, *_ = problem.product
    rotation = rotations(problem.weight_bytes)
    x = torch.randn(problem.rows, inner, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (out, inner // 2), device="cuda", dtype=torch.uint8)
    weights = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(rotation)]
    scales = torch.full((inner // 128, out, 2), 2.0**-6, device="cuda", dtype=torch.bfloat16)

    def call(i: int) -> None:
        with torch.no_grad():
            torch.ops.aten._weight_int4pack_mm(x, weights[i], 128, scales)

    return captured(call, rotation)
