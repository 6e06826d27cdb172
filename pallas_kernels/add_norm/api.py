"""Signature, checks and choice of backend."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

BACKENDS = ("triton", "xla", "reference")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
KINDS = ("rms", "layer", None)


def add_norm(
    x: Float[Array, "*batch D"],
    update: Float[Array, "*any D"] | None,
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    kind: str | None = "rms",
    eps: float,
    offset: float = 0.0,
    multiplier: float = 1.0,
    update_scale: Float[Array, "D"] | None = None,
    update_bias: Float[Array, "D"] | None = None,
    update_kind: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """Add an update to the residual stream and take the norm of the sum.

    Everything up to the sum is in float32, which is rounded once to the dtype of `x`. The norm is of what was stored,
    in float32 too: RMS norm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) with the variance of what is left when
    the mean is taken off.

    Args:
      x: residual stream; float32, bfloat16 or float16.
      update: what to add, in the shape of `x`; or in parts `[s, *batch, D]`, as `few_row_matmul` gives them; `None` to
        add nothing.
      scale: weight of the norm; `None` for one without.
      bias: added after the weight.
      kind: `"rms"` or `"layer"`; `None` for no norm, when the second result is the first.
      eps: added to the mean square or the variance, of both norms.
      offset: added in float32 to `scale` and `update_scale` where they are given (Gemma stores weights less one).
      multiplier: of the update, after its norm (Granite).
      update_scale: weight of the norm of the update.
      update_bias: added after that weight.
      update_kind: the update too is normed before it is added (Gemma 2, OLMo 2), by `"rms"` or `"layer"`.
      implementation: `"triton"`, `"xla"` (differentiable) or `"reference"`; `None` for the best that the platform has.

    Returns:
      The sum, `x` itself where there is no update, and its norm; both in the shape and dtype of `x`.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or the backend can not run; the message says why.
    """
    _check(x, update, scale, bias, kind, update_scale, update_bias, update_kind)
    if update is None and kind is None:
        return x, x
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    parts = None if update is None else update.reshape(1 if update.shape == x.shape else update.shape[0], *rows.shape)
    backend = dispatch.select(__name__, BACKENDS, implementation, rows, parts)
    with jax.named_scope("add_norm"):
        total, normed = backend.add_norm(
            rows,
            parts,
            scale,
            bias,
            kind=kind,
            eps=eps,
            offset=offset,
            multiplier=multiplier,
            update_scale=update_scale,
            update_bias=update_bias,
            update_kind=update_kind,
        )
    return (x if update is None else total.reshape(x.shape)), normed.reshape(x.shape)


def _check(x, update, scale, bias, kind, update_scale, update_bias, update_kind):
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be float32, bfloat16 or float16")
    if update is not None and update.shape != x.shape and (update.shape[1:] != x.shape or not update.shape[0]):
        raise ValueError(f"update {update.shape} must have the shape of x {x.shape}, or one axis of parts before it")
    if update is None and update_kind is not None:
        raise ValueError(f"update_kind={update_kind!r} is a norm of the update, and there is none: leave it None")
    for prefix, norm, weights in (("", kind, (scale, bias)), ("update_", update_kind, (update_scale, update_bias))):
        if norm not in KINDS:
            raise ValueError(f"{prefix}kind={norm!r} is unknown; it must be 'rms', 'layer' or None")
        for name, weight in zip(("scale", "bias"), weights, strict=True):
            if weight is not None and norm is None:
                raise ValueError(f"{prefix}{name} belongs to a norm: give {prefix}kind, or leave it None")
            if weight is not None and weight.shape != x.shape[-1:]:
                raise ValueError(
                    f"{prefix}{name} {weight.shape} must have one entry for each of the {x.shape[-1]} columns of x"
                )
