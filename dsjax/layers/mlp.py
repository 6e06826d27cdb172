"""The gated feed-forward layer (arXiv 2002.05202)."""

from typing import Any

from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.layers.linear import linear
from pallas_kernels.few_row_matmul import ACTIVATIONS


def mlp(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, implementation: str | None = "xla"
) -> Float[Array, "*parts_and_batch D"]:
    """`down(activation(gate(x)) * up(x))`; gate and up are one product when the tree is fused.

    With kernels, the result may be partial sums in float32; see `linear`.
    """
    if "gate_up" in module:
        hidden = linear(x, module["gate_up"], implementation, activation=config.activation)
    else:
        gate, up = (linear(x, module[name], implementation) for name in ("gate", "up"))
        hidden = ACTIVATIONS[config.activation](gate) * up
    return linear(hidden, module["down"], implementation, partial=True)
