"""The feed-forward layer, plain or gated (arXiv 2002.05202)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import JOINT_ACTIVATIONS, ModelConfig
from dsjax.layers.linear import linear
from pallas_kernels.few_row_matmul import ACTIVATIONS


def mlp(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, implementation: str | None = "xla"
) -> Float[Array, "*parts_and_batch D"]:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` where the model has no gates.

    Gate and up are one product when the tree is fused. With kernels, the result may be partial sums in float32; see
    `linear`.
    """
    if not config.gated:
        hidden = ACTIVATIONS[config.activation](linear(x, module["up"], implementation))
    elif "gate_up" in module and config.activation not in JOINT_ACTIVATIONS:
        hidden = linear(x, module["gate_up"], implementation, activation=config.activation)
    else:
        if "gate_up" in module:
            gate, up = jnp.split(linear(x, module["gate_up"], implementation), 2, axis=-1)
        else:
            gate, up = (linear(x, module[name], implementation) for name in ("gate", "up"))
        hidden = _gated(gate, up, config.activation)
    return linear(hidden, module["down"], implementation, partial=True)


def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    if activation == "clamped_swiglu":  # gpt-oss: a SiLU of slope 1.702, both sides clamped at 7, the input around 1
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up
