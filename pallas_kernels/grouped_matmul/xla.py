"""The product in plain XLA operations: a loop over the blocks of the plan, which reads the weights that they need."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.plan import Plan
from pallas_kernels.grouped_matmul.reference import activate, scattered
from pallas_kernels.grouped_matmul.weights import dense


def matmul(x, weight, plan: Plan, *, gather, scatter, bias, activation, gated, scale, dtype):
    """See `api.grouped_matmul`."""
    pairs = plan.order.shape[0]
    columns = weight.shape[1] // (2 if activation is not None and gated else 1)

    def add_block(out, block):
        expert, start, rows = block
        index = jnp.arange(plan.block_rows)
        place = jnp.where(index < rows, start + index, pairs)
        pair = plan.order.at[place].get(mode="fill", fill_value=pairs)
        tile = x.at[pair // plan.choices if gather else place].get(mode="fill", fill_value=0)
        contract = (((1,), (1,)), ((), ()))
        # An index of an expert that there is not is that of the last one.
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weight)
        product = lax.dot_general(tile, dense(own, x.dtype), contract, preferred_element_type=jnp.float32)
        if bias is not None:
            product += lax.dynamic_index_in_dim(bias, expert, keepdims=False).astype(jnp.float32)
        product = activate(product, activation, gated)
        if scale is not None:
            product *= scale.reshape(-1).at[pair].get(mode="fill", fill_value=0)[:, None]
        product = jnp.where(expert < plan.num_experts, product, 0)
        return out.at[place].set(product.astype(dtype), mode="drop", unique_indices=False), None

    out = lax.scan(add_block, jnp.zeros((pairs, columns), dtype), plan.blocks.T)[0]
    return scattered(out, plan) if scatter else out
