"""What the op means, written for reading."""

import jax
import jax.numpy as jnp

from pallas_kernels.few_row_matmul.reference import ACTIVATIONS as PLAIN
from pallas_kernels.grouped_matmul.plan import Plan, expert_of_row
from pallas_kernels.grouped_matmul.weights import dense


def clamped_swiglu(gate, up):
    """That of gpt-oss: a SiLU of slope 1.702, both sides clamped at 7, the input around 1."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


JOINT = {"clamped_swiglu": clamped_swiglu}  # of gate and up together, not of the gate alone
ACTIVATIONS = (*PLAIN, *JOINT)


def activate(product, activation, gated):
    """The activation of a float32 product whose first half of columns is the gate, if there is one."""
    if activation is None:
        return product
    if not gated:
        return PLAIN[activation](product)
    gate, up = jnp.split(product, 2, axis=-1)
    return JOINT[activation](gate, up) if activation in JOINT else PLAIN[activation](gate) * up


def scattered(rows, plan: Plan):
    """Rows in the order of the plan, back where their pairs are: `[k, T, N]`."""
    pairs = jnp.zeros_like(rows).at[plan.order].set(rows, unique_indices=True)
    return pairs.reshape(-1, plan.choices, rows.shape[-1]).swapaxes(0, 1)


def matmul(x, weight, plan: Plan, *, gather, scatter, bias, activation, gated, scale, dtype):
    """The oracle of every backend; see `api.grouped_matmul`. A weight for every row, all in float32."""
    expert = expert_of_row(plan)
    rows = x[plan.order // plan.choices] if gather else x

    def of_rows(leaf):
        return leaf.at[expert].get(mode="fill", fill_value=0).astype(jnp.float32)

    precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum("pd,pod->po", rows.astype(jnp.float32), of_rows(dense(weight, jnp.float32)), precision=precision)
    if bias is not None:
        out += of_rows(bias)
    out = activate(out, activation, gated)
    if scale is not None:
        out *= scale.reshape(-1)[plan.order, None]
    out = jnp.where((expert < plan.num_experts)[:, None], out, 0).astype(dtype)
    return scattered(out, plan) if scatter else out
