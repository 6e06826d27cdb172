"""Weights of experts in few bits."""

import dataclasses
import functools
from typing import Any

import jax

from pallas_kernels.quantized_matmul import Format, dequantize


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "zeros", "minimums", "tensor_scale"],
    meta_fields=["format"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedExperts:
    """The weights of all experts as `quantized_matmul` takes that of one, each array with an axis `E` in front."""

    # Not `jax.Array`: functions of trees make such objects of other things too, and tests check annotations.

    values: Any  # [E, O, K * bits / 8], or tiles
    scales: Any  # [E, O / rows, K / group], in tiles the other way round
    zeros: Any = None  # of the shape of the scales, or None
    minimums: Any = None  # of the shape of the scales, or None
    tensor_scale: Any = None  # float32 [E, 1, 1] or [E, O, 1], or None
    format: Format = Format("int8")

    @property
    def shape(self) -> tuple[int, ...]:
        """`[E, O, K]` of the weights that it stands for."""
        return self.format.shape(self.values)


def dense(weight: jax.Array | QuantizedExperts, dtype: Any) -> jax.Array:
    """The weights as a plain array."""
    if not isinstance(weight, QuantizedExperts):
        return weight.astype(dtype)
    parts = weight.values, weight.scales, weight.zeros, weight.minimums, weight.tensor_scale
    return dequantize(*parts, format=weight.format, dtype=dtype)
