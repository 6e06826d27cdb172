"""Linear layers and the embedding, over plain and quantized leaves alike."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.quantization import QuantizedArray

Weight = jax.Array | QuantizedArray
# XLA:CPU streams the large operand best from the left, where the other has few rows: at 8 rows in 0.65 of the time, at
# 64 in 0.86; at 512 the other way round is faster.
FEW_ROWS = 128


def matmul(x: Float[Array, "*batch inner"], weight: Weight, dtype: Any = None) -> Float[Array, "*batch out"]:
    """Product with a weight `[out, in]`.

    Args:
      x: activations.
      weight: plain or quantized leaf.
      dtype: of the result and of the accumulation, default that of `x`.

    Returns:
      `x @ weight.T`.
    """
    dtype = dtype or x.dtype
    dense = weight.dequantize(x.dtype) if isinstance(weight, QuantizedArray) else weight.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])

    def rows_first(rows, dense):
        return lax.dot_general(rows, dense, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def weight_first(rows, dense):
        out = lax.dot_general(dense, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return lax.optimization_barrier(out).T  # else XLA swaps the operands back to save the transpose

    if 1 < rows.shape[0] <= FEW_ROWS:
        out = lax.platform_dependent(rows, dense, cpu=weight_first, default=rows_first)
    else:
        out = rows_first(rows, dense)
    return out.reshape(*x.shape[:-1], dense.shape[0])


def linear(x: Float[Array, "*batch inner"], module: dict[str, Any]) -> Float[Array, "*batch out"]:
    """Affine layer: `module["weight"]` is `[out, in]`, `module["bias"]`, where there is one, `[out]`."""
    out = matmul(x, module["weight"])
    return out + module["bias"].astype(out.dtype) if "bias" in module else out


def embed(tokens: Int[Array, "*batch"], table: Weight) -> Float[Array, "*batch D"]:
    """Rows of the embedding table for token ids; only those rows are dequantized."""
    rows = table[tokens]
    return rows.dequantize() if isinstance(rows, QuantizedArray) else rows


def head(x: Float[Array, "*batch D"], params: dict[str, Any]) -> Float[Array, "*batch V"]:
    """Logits in float32, from the tied embedding when the tree has no head."""
    return matmul(x, params["head" if "head" in params else "embed"]["weight"], jnp.float32)
