"""The mixture of experts: a router chooses a few gated feed-forward networks for each token (arXiv 1701.06538)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.layers.linear import matmul
from dsjax.layers.mlp import mlp

# A decode step is bound by reading weights, and more than a few tokens need every expert's. So a GPU computes all
# experts for all tokens: plain products, no loop. Beyond this many, arithmetic and memory count, and blocks pay.
FEW_TOKENS = 512
# Rows of the largest block. Each block copies its expert's weights, and half of an expert's last block is padding.
LARGEST_BLOCK = 256


def moe(x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig) -> Float[Array, "*batch D"]:
    """Outputs of each token's experts, weighted by the router and added up in float32.

    Experts have no capacity, so what a token gets does not depend on the others.

    Args:
      x: activations.
      module: `router.weight [E, D]`, and `experts`: the leaves of `mlp`, each with an axis `E` in front.
      config: the architecture.

    Returns:
      The sum, in the dtype of `x`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(tokens, module["router"]["weight"], config)
    arguments = tokens, weights, chosen, module["experts"]
    grouped = functools.partial(_grouped, config=config)
    if tokens.shape[0] <= FEW_TOKENS:
        out = lax.platform_dependent(*arguments, cpu=grouped, default=functools.partial(_every_expert, config=config))
    else:
        out = grouped(*arguments)
    return out.astype(x.dtype).reshape(x.shape)


def route(x: Float[Array, "T D"], weight: Any, config: ModelConfig) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Weights in float32 and numbers of each token's experts; of equally likely ones, the lower number comes first.

    Args:
      x: activations.
      weight: the router's, `[E, D]`, plain or quantized.
      config: how many experts to choose, and whether their weights are renormalized.
    """
    probabilities = jax.nn.softmax(matmul(x, weight, jnp.float32), axis=-1)
    weights, chosen = lax.top_k(probabilities, config.experts_per_token)
    if config.renormalize_experts:
        weights /= weights.sum(axis=-1, keepdims=True)
    return weights, chosen


def _every_expert(tokens, weights, chosen, experts, config: ModelConfig):
    """All experts for all tokens, then those chosen: each weight is read once."""
    outputs = jax.vmap(mlp, in_axes=(None, 0, None))(tokens, experts, config).astype(jnp.float32)
    share = jnp.sum(jax.nn.one_hot(chosen, config.num_experts) * weights[..., None], axis=1).T[..., None]
    # Not zero times the output: an expert may overflow on a token that it was not meant for.
    return jnp.sum(jnp.where(share > 0, share * outputs, 0), axis=0)


def _grouped(tokens, weights, chosen, experts, config: ModelConfig):
    """Pairs of a token and an expert, sorted by expert and cut into blocks of one expert each.

    With blocks of 2, where the tokens 0, 1, 2 chose the experts (0, 2), (2, 0), (2, 1):

        expert   0      1      2      2
        tokens   0 1    2 -    0 1    2 -
    """
    choices, num_experts = chosen.shape[1], config.num_experts
    pairs = chosen.size
    size = min(1 << max(pairs // num_experts, 1).bit_length() - 1, LARGEST_BLOCK)
    busy = min(pairs, num_experts)
    num_blocks = busy + (pairs - busy) // size  # the most that any choice of experts can fill

    order = jnp.argsort(chosen.reshape(-1))
    lengths = jnp.bincount(chosen.reshape(-1), length=num_experts)
    ends = jnp.cumsum(lengths)
    blocks = -(-lengths // size)
    last_blocks = jnp.cumsum(blocks)
    index = jnp.arange(num_blocks)
    # Blocks that nothing fills go to the last expert, past its last row.
    expert = jnp.minimum(jnp.searchsorted(last_blocks, index, side="right", method="compare_all"), num_experts - 1)
    first_row = (ends - lengths)[expert] + (index - (last_blocks - blocks)[expert]) * size
    row = first_row[:, None] + jnp.arange(size)
    pair = jnp.where(row < ends[expert][:, None], order.at[row].get(mode="clip"), pairs)

    @jax.checkpoint  # else the backward pass would keep the weights of every block
    def add_block(total, block):
        expert, pair = block
        token = pair // choices
        share = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)
        rows = tokens.at[token].get(mode="fill", fill_value=0)
        out = mlp(rows, jax.tree.map(lambda leaf: leaf[expert], experts), config)
        return total.at[token].add(out.astype(jnp.float32) * share[:, None], mode="drop"), None

    return lax.scan(add_block, jnp.zeros(tokens.shape, jnp.float32), (expert, pair))[0]
