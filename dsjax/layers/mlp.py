"""The gated feed-forward layer (arXiv 2002.05202)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.layers.linear import linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def mlp(x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig) -> Float[Array, "*batch D"]:
    """`down(activation(gate(x)) * up(x))`; gate and up are one product when the tree is fused."""
    if "gate_up" in module:
        gate, up = jnp.split(linear(x, module["gate_up"]), 2, axis=-1)
    else:
        gate, up = linear(x, module["gate"]), linear(x, module["up"])
    return linear(ACTIVATIONS[config.activation](gate) * up, module["down"])
