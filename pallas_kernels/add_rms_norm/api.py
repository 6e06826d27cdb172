"""Signature, checks and choice of backend."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

BACKENDS = ("triton", "xla", "reference")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def add_rms_norm(
    x: Float[Array, "*batch D"],
    update: Float[Array, "*any D"] | None,
    scale: Float[Array, "D"],
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """Add an update to the residual stream and take the RMS norm of the sum (arXiv 1910.07467).

    The sum is in float32 and rounded once to the dtype of `x`. The norm is of what was stored, statistics in float32.

    Args:
      x: residual stream; float32, bfloat16 or float16.
      update: what to add, in the shape of `x`; or in parts `[s, *batch, D]`, as `few_row_matmul` gives them; `None` to
        add nothing.
      scale: weight of the norm.
      eps: added to the mean square.
      implementation: `"triton"`, `"xla"` (differentiable) or `"reference"`; `None` for the best that the platform has.

    Returns:
      The sum, `x` itself where there is no update, and its norm; both in the shape and dtype of `x`.

    Raises:
      ValueError: shapes or dtypes do not fit each other, or the backend can not run; the message says why.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be float32, bfloat16 or float16")
    if update is not None and update.shape != x.shape and (update.shape[1:] != x.shape or not update.shape[0]):
        raise ValueError(f"update {update.shape} must have the shape of x {x.shape}, or one axis of parts before it")
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale {scale.shape} must have one entry for each of the {x.shape[-1]} columns of x")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    parts = None if update is None else update.reshape(1 if update.shape == x.shape else update.shape[0], *rows.shape)
    backend = dispatch.select(__name__, BACKENDS, implementation, rows, parts)
    with jax.named_scope("add_rms_norm"):
        total, normed = backend.add_rms_norm(rows, parts, scale, eps=eps)
    return (x if update is None else total.reshape(x.shape)), normed.reshape(x.shape)
