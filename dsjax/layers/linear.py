"""Linear layers, the embedding and the head, over plain and quantized leaves alike."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.layers.norm import norm
from dsjax.quantization import QuantizedArray
from dsjax.quantization.activations import quantized_product
from pallas_kernels.dispatch import current_gpu, prefers_kernels
from pallas_kernels.few_row_matmul import ACTIVATIONS, MAX_ROWS, few_row_matmul
from pallas_kernels.quantized_matmul import MAX_ROWS as MAX_QUANTIZED_ROWS
from pallas_kernels.quantized_matmul import quantized_matmul

Weight = jax.Array | QuantizedArray
# XLA:CPU streams the large operand best from the left, where the other has few rows: at 8 rows in 0.65 of the time, at
# 64 in 0.86; at 512 the other way round is faster.
FEW_ROWS = 128


def dense_weight(weight: Weight, dtype: Any) -> jax.Array:
    """A weight as a plain array."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedArray) else weight.astype(dtype)


def matmul(
    x: Float[Array, "*batch inner"], weight: Weight, dtype: Any = None, implementation: str | None = "xla"
) -> Float[Array, "*batch out"]:
    """Product with a weight `[out, in]`.

    Args:
      x: activations.
      weight: plain or quantized leaf.
      dtype: of the result and of the accumulation, default that of `x`.
      implementation: as for `linear`, of products with quantized weights.

    Returns:
      `x @ weight.T`.
    """
    dtype = dtype or x.dtype
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, QuantizedArray):
        has_kernel = _has_kernel(weight, rows.shape[0]) and prefers_kernels(implementation)
        out = _quantized(rows, weight, dtype, implementation if has_kernel else "xla")
        return out.reshape(*x.shape[:-1], -1)
    dense = weight.astype(x.dtype)

    def rows_first(rows, dense):
        return lax.dot_general(rows, dense, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def weight_first(rows, dense):
        out = lax.dot_general(dense, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return lax.optimization_barrier(out).T  # else XLA swaps the operands back to save the transpose

    is_few = 1 < rows.shape[0] <= FEW_ROWS and current_gpu() is None
    out = (weight_first if is_few else rows_first)(rows, dense)
    return out.reshape(*x.shape[:-1], dense.shape[0])


def _has_kernel(weight: Weight, rows: int) -> bool:
    if not isinstance(weight, QuantizedArray):
        return rows <= MAX_ROWS
    return weight.layout == "tiles" and weight.scheme.activations is None and rows <= MAX_QUANTIZED_ROWS


def _quantized(
    rows: Float[Array, "M inner"], weight: QuantizedArray, dtype: Any, implementation: str | None = "xla", **options
):
    """Product with a quantized weight, in `dtype` but for partial sums; see `quantized_matmul` for the options."""
    if weight.scheme.activations is not None:
        return quantized_product(rows, weight, dtype)
    rows = weight.inputs(rows)
    wants_sums = dtype == jnp.float32 and rows.dtype != jnp.float32
    out = quantized_matmul(
        rows,
        weight.values,
        weight.scales,
        weight.zeros,
        weight.minimums,
        weight.tensor_scale,
        format=weight.format,
        implementation=implementation,
        **{"partial": wants_sums} | options,
    )
    return out.sum(axis=0) if wants_sums else out


def linear(
    x: Float[Array, "*batch inner"],
    module: dict[str, Any],
    implementation: str | None = "xla",
    *,
    activation: str | None = None,
    partial: bool = False,
) -> Float[Array, "*parts_and_batch out"]:
    """Affine layer: `module["weight"]` is `[out, in]`, `module["bias"]`, where there is one, `[out]`.

    Args:
      x: activations.
      module: weight and bias.
      implementation: `"xla"` for plain products, which are differentiable; else what `few_row_matmul` takes, whose
        kernel runs where it can and rows are few.
      activation: the weight is that of a gate and, below it, that of its input: give `activation(gate) * input`.
      partial: the caller adds: the kernel may give float32 partial sums, `[parts, *batch, out]`.

    Returns:
      The result, in the dtype of `x` unless it is partial.
    """
    weight, bias = module["weight"], module.get("bias")
    rows = math.prod(x.shape[:-1])
    if _has_kernel(weight, rows) and prefers_kernels(implementation):
        flat = x.reshape(rows, -1)
        options: dict[str, Any] = {
            "bias": bias,
            "activation": activation,
            "partial": partial and bias is None,
            "implementation": implementation,
        }
        if isinstance(weight, QuantizedArray):
            out = _quantized(flat, weight, x.dtype, **options)
        else:
            out = few_row_matmul(flat, weight.astype(x.dtype), **options)
        return out.reshape(*out.shape[:-2], *x.shape[:-1], -1)
    out = matmul(x, weight)
    if bias is not None:
        out += bias.astype(out.dtype)
    if activation is None:
        return out
    gate, up = jnp.split(out, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up


def rows_of(table: Weight, index: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of a table; only those are dequantized."""
    rows = table[index]
    return rows.dequantize() if isinstance(rows, QuantizedArray) else rows


def embed(
    tokens: Int[Array, "*batch"],
    positions: Int[Array, "*rows"],
    params: dict[str, Any],
    config: ModelConfig,
    token_types: Int[Array, "*#batch"] | None = None,
) -> Float[Array, "*batch D"]:
    """What enters the first layer: the tokens' embeddings, and what the model adds and does to them.

    Args:
      tokens: token ids.
      positions: places in their sequences.
      params: the model's tree.
      config: the architecture.
      token_types: segment of each token, default the first, in models that tell segments apart.
    """
    x = rows_of(params["embed"]["weight"], tokens)
    if config.embed_scale != 1.0:
        x *= jnp.asarray(config.embed_scale, x.dtype)
    if config.embed_size is not None:
        x = linear(x, params["embed_in"])
    if config.learned_positions:
        x += rows_of(params["positions"]["weight"], positions + config.position_offset)
    if config.token_types:
        x += rows_of(params["token_types"]["weight"], jnp.zeros(1, jnp.int32) if token_types is None else token_types)
    return norm(x, params["embed_norm"], config) if config.embed_norm else x


def head(
    x: Float[Array, "*batch D"], params: dict[str, Any], config: ModelConfig, implementation: str | None = "xla"
) -> Float[Array, "*batch V"]:
    """Logits in float32, from the tied embedding when the tree has no head; `implementation` as for `linear`."""
    if config.embed_size is not None:
        x = linear(x, params["embed_out"])
    logits = matmul(x, params["embed" if config.tie_embeddings else "head"]["weight"], jnp.float32, implementation)
    if config.head_bias:
        logits += params["head"]["bias"].astype(jnp.float32)
    if config.logit_scale != 1.0:
        logits *= config.logit_scale
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return logits
