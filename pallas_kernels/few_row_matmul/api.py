"""Signature, checks and choice of backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.few_row_matmul.reference import ACTIVATIONS

BACKENDS = ("triton", "xla", "reference")
MAX_ROWS = 64  # what the kernel takes
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def few_row_matmul(
    x: Float[Array, "T D"],
    weight: Float[Array, "O D"],
    *,
    bias: Float[Array, "O"] | None = None,
    activation: str | None = None,
    partial: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T N"] | Float32[Array, "s T O"]:
    """Product of rows with a weight, `x @ weight.T`, with bias and gated activation in the same kernel.

    Made for a decode step, where the product is bound by the bytes of the weight. Sums, bias and activation are in
    float32 and rounded once; float32 is not shortened to TF32.

    Args:
      x: rows; float32, bfloat16 or float16.
      weight: `[O, D]`, used in the dtype of `x`.
      bias: added to the product.
      activation: `"silu"`, `"gelu"` (with erf), `"gelu_tanh"`, `"quick_gelu"` (`x * sigmoid(1.702 * x)`), `"relu"` or
        `"relu2"` (its square): the weight holds the rows of the gate and then those of the up projection, half each,
        and the result is `activation(gate) * up` (arXiv 2002.05202).
      partial: give float32 sums over parts of `D`, for a consumer that reads and adds anyway; without activation and
        bias. On a GPU there are as many parts as it takes to give every multiprocessor work.
      implementation: `"triton"` (at most 64 rows), `"xla"` or `"reference"`; `None` for the best that the platform has.

    Returns:
      `[T, O]` in the dtype of `x`; `[T, O / 2]` with an activation; with `partial`, `float32[s, T, O]` whose sum over
      the first axis is the product, `s` being static.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or the backend can not run; the message says why.
    """
    _check(x, weight, bias, activation, partial)
    backend = dispatch.select(__name__, BACKENDS, implementation, x, weight)
    with jax.named_scope("few_row_matmul"):
        return backend.matmul(x, weight, bias=bias, activation=activation, partial=partial)


def _check(x, weight, bias, activation, partial):
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [T, D] and [O, D]")
    for name, each in (("x", x), ("weight", weight)):
        if each.dtype not in DTYPES:
            raise ValueError(f"{name} is {each.dtype}; it must be float32, bfloat16 or float16")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {bias.shape} must have one entry for each of the {weight.shape[0]} rows of the weight")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; there are {sorted(ACTIVATIONS)}")
    if activation is not None and weight.shape[0] % 2:
        raise ValueError(
            f"an activation needs as many gate rows as up rows, and weight {weight.shape} has an odd number"
        )
    if partial and (activation is not None or bias is not None):
        raise ValueError("partial sums take no activation and no bias: those need the whole sum")
