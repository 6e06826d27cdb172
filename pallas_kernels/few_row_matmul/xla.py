"""The product in plain XLA operations: what runs on a CPU, and for more rows than the kernel takes."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.few_row_matmul.reference import finish


def matmul(x, weight, *, bias, activation, partial):
    """See `api.few_row_matmul`; there is one part."""
    contract = (((1,), (1,)), ((), ()))
    product = lax.dot_general(x, weight.astype(x.dtype), contract, preferred_element_type=jnp.float32)
    return product[None] if partial else finish(product, bias, activation, x.dtype)
