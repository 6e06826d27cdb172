"""What the op means, written for reading; the activations are shared with the `xla` backend."""

import functools

import jax
import jax.numpy as jnp

# Gated feed-forward layers (arXiv 2002.05202) are named by the function on the gate; "gelu" is the one with erf,
# "quick_gelu" its approximation by a logistic function (arXiv 1606.08415), "relu2" the square of "relu" (arXiv
# 2109.08668).
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def finish(product, bias, activation, dtype):
    """Bias, activation and cast of a float32 product."""
    if bias is not None:
        product = product + bias.astype(jnp.float32)
    if activation is not None:
        gate, up = jnp.split(product, 2, axis=-1)
        product = ACTIVATIONS[activation](gate) * up
    return product.astype(dtype)


def matmul(x, weight, *, bias, activation, partial):
    """The oracle of every backend; see `api.few_row_matmul`. All in float32."""
    wide = (each.astype(jnp.float32) for each in (x, weight))
    product = jnp.einsum("td,od->to", *wide, precision=jax.lax.Precision.HIGHEST)
    return product[None] if partial else finish(product, bias, activation, x.dtype)
