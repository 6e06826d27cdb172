"""Signature, checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.plan import Plan
from pallas_kernels.grouped_matmul.reference import ACTIVATIONS, JOINT
from pallas_kernels.grouped_matmul.weights import QuantizedExperts

BACKENDS = ("triton", "xla", "reference")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    x: Float[Array, "R D"],
    weight: Float[Array, "E O D"] | QuantizedExperts,
    plan: Plan,
    *,
    gather: bool = False,
    scatter: bool = False,
    bias: Float[Array, "E O"] | None = None,
    activation: str | None = None,
    gated: bool = True,
    scale: Float[Array, "T k"] | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "P N"] | Float[Array, "k T N"]:
    """Product of each row with the weight of its expert, `x @ weight[expert].T`.

    A mixture of experts (arXiv 1701.06538) is two of these: one gathers the tokens' rows and ends in the activation,
    the other brings the results back to where their tokens are, weighted:

        plan = plan_experts(chosen, num_experts)
        hidden = grouped_matmul(x, gate_up, plan, gather=True, activation="silu")
        parts = grouped_matmul(hidden, down, plan, scatter=True, scale=router_weights)

    No sorted copy of the tokens is written, and only the weights of experts that some token chose are read. Sums,
    bias, activation and scale are in float32 and rounded once; float32 is not shortened to TF32. What a pair gets
    depends on no other, whatever that holds: results are written, not added up, so parts are left to a sum that has
    an order.

    Args:
      x: rows in the order of the plan, one a pair; with `gather`, one a token. Float32, bfloat16 or float16.
      weight: of all experts, used in the dtype of `x`; or in few bits, decoded on the way to the tensor cores.
      plan: from `plan_experts`.
      gather: `x` is `[T, D]`, and a pair's row is that of its token.
      scatter: give the result of each pair where its token is, `[k, T, N]`.
      bias: added to the product.
      activation: a function of the gate as in `few_row_matmul`, or `"clamped_swiglu"` (gpt-oss), of gate and up: the
        weight holds the rows of the gate and then those of the up projection, half each.
      gated: if false, the activation is of the product itself.
      scale: of each pair, multiplied in the end.
      dtype: of the result, default that of `x`.
      implementation: `"triton"`, `"xla"` (differentiable) or `"reference"`; `None` for the best that can run.

    Returns:
      `[P, N]` in the order of the plan, or with `scatter` `[k, T, N]`, whose sum over the first axis is the mixture;
      `N` is `O`, or `O / 2` with a gate. Pairs without an expert are 0.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other, or the backend can not run; the message says why.
    """
    _check(x, weight, plan, gather, bias, activation, gated, scale)
    options = {"gather": gather, "scatter": scatter, "bias": bias, "activation": activation, "gated": gated}
    backend = dispatch.select(__name__, BACKENDS, implementation, x, weight, plan)
    with jax.named_scope("grouped_matmul"):
        return backend.matmul(x, weight, plan, **options, scale=scale, dtype=jnp.dtype(dtype or x.dtype))


def _check(x, weight, plan, gather, bias, activation, gated, scale):
    if len(weight.shape) != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [rows, D] and [E, O, D]")
    if weight.shape[0] != plan.num_experts:
        raise ValueError(f"weight {weight.shape} is of {weight.shape[0]} experts, the plan of {plan.num_experts}")
    pairs = plan.order.shape[0]
    rows, what = (pairs // plan.choices, "token") if gather else (pairs, "pair")
    if x.shape[0] != rows:
        raise ValueError(f"x {x.shape} must have a row for each {what} of the plan, which has {rows}")
    floating = {"x": x} if isinstance(weight, QuantizedExperts) else {"x": x, "weight": weight}
    for name, each in floating.items():
        if each.dtype not in DTYPES:
            raise ValueError(f"{name} is {each.dtype}; it must be float32, bfloat16 or float16")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias {bias.shape} must have an entry for each row of the weights {weight.shape}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; there are {sorted(ACTIVATIONS)}")
    if activation in JOINT and not gated:
        raise ValueError(f"activation={activation!r} is of a gate and its input: it can not be gated=False")
    if activation is not None and gated and weight.shape[1] % 2:
        raise ValueError(f"a gate needs as many rows as its input, and weight {weight.shape} has an odd number")
    if scale is not None and scale.shape != (pairs // plan.choices, plan.choices):
        raise ValueError(f"scale {scale.shape} must be {(pairs // plan.choices, plan.choices)}, one for each pair")
