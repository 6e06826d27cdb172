"""The mixture of experts: a router chooses a few gated feed-forward networks for each token (arXiv 1701.06538)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.config import Experts, ModelConfig
from dsjax.layers.linear import matmul
from dsjax.layers.mlp import mlp

# A decode step is bound by reading weights, and more than a few tokens need every expert's. So a GPU computes all
# experts for all tokens: plain products, no loop. Beyond this many, arithmetic and memory count, and blocks pay.
FEW_TOKENS = 512
# Of many experts a token or two need few: these are copied out of the stack. A copy is read, written and read again.
COST_OF_A_COPY = 3
# Rows of the largest block. Each block copies its expert's weights, and half of an expert's last block is padding.
LARGEST_BLOCK = 256


def moe(x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig) -> Float[Array, "*batch D"]:
    """Outputs of each token's experts, weighted by the router and added up in float32.

    Experts have no capacity, so what a token gets does not depend on the others.

    Args:
      x: activations.
      module: `router`, `experts`: the leaves of `mlp`, each with an axis `E` in front; and where the model has a
        network that all tokens pass, `shared` and what mixes it in.
      config: the architecture.

    Returns:
      The sum, in the dtype of `x`.
    """
    experts = config.experts
    assert experts is not None
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(tokens, module["router"], experts)
    arguments = tokens, weights, chosen, module["experts"]
    grouped = functools.partial(_grouped, config=config)
    if tokens.shape[0] <= FEW_TOKENS:
        on_gpu = _chosen_experts if COST_OF_A_COPY * chosen.size <= experts.count else _every_expert
        out = lax.platform_dependent(*arguments, cpu=grouped, default=functools.partial(on_gpu, config=config))
    else:
        out = grouped(*arguments)
    if experts.shared_size:
        out = _with_shared(out, tokens, module, config, experts.shared_mix)
    return out.astype(x.dtype).reshape(x.shape)


def _with_shared(out: Float[Array, "T D"], tokens, module, config: ModelConfig, mix: str) -> Float[Array, "T D"]:
    """The experts' sum and the shared network's output, mixed; float32."""
    shared = mlp(tokens, module["shared"], config).astype(jnp.float32)
    if mix == "sum":
        return out + shared
    logits = matmul(tokens, module["shared_gate"]["weight"], jnp.float32)
    if "bias" in module["shared_gate"]:
        logits += module["shared_gate"]["bias"].astype(jnp.float32)
    if mix == "gate":
        return out + jax.nn.sigmoid(logits) * shared
    share = jax.nn.softmax(logits, axis=-1)
    return share[:, :1] * out + share[:, 1:] * shared


def route(
    x: Float[Array, "T D"], module: dict[str, Any], experts: Experts
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Weights in float32 and numbers of each token's experts; of equally likely ones, the lower number comes first.

    Args:
      x: activations.
      module: the router's `weight [E, D]`, plain or quantized, and, where it has them, `bias [E]`, `correction [E]`.
      experts: how to choose.
    """
    logits = matmul(x, module["weight"], jnp.float32)
    if experts.router_bias:
        logits += module["bias"].astype(jnp.float32)
    if experts.score == "sparsemixer":
        return _sparsemixer(logits, experts.jitter)
    scores = jax.nn.sigmoid(logits) if experts.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    preference = scores + module["correction"].astype(jnp.float32) if experts.correction else scores
    if experts.groups > 1:
        preference = _within_groups(preference, experts)
    weights, chosen = lax.top_k(preference, experts.per_token)
    if preference is not scores:
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.renormalize:
        weights /= weights.sum(axis=-1, keepdims=True)
    return (weights if experts.scale == 1.0 else weights * experts.scale), chosen


def _within_groups(preference: Float[Array, "T E"], experts: Experts) -> Float[Array, "T E"]:
    """Minus infinity for experts outside of each token's best groups."""
    grouped = preference.reshape(preference.shape[0], experts.groups, -1)
    best = lax.top_k(grouped, 1 if experts.group_score == "max" else 2)[0].sum(axis=-1)
    groups = lax.top_k(best, experts.groups_per_token)[1]
    allowed = jax.nn.one_hot(groups, experts.groups, dtype=bool).any(axis=1)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(preference.shape)


def _sparsemixer(logits: Float[Array, "T E"], jitter: float) -> tuple[Float[Array, "T 2"], Int[Array, "T 2"]]:
    """Two experts one after the other, each weighted within those about as good (arXiv 2409.12136, at inference)."""
    weights, chosen, left = [], [], logits
    for _ in range(2):
        best = left.max(axis=-1, keepdims=True)
        distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        share = jax.nn.softmax(jnp.where(distance > 2 * jitter, -jnp.inf, left), axis=-1)
        index = jnp.argmax(left, axis=-1)[:, None]
        weights.append(jnp.take_along_axis(share, index, axis=-1))
        chosen.append(index)
        left = jnp.where(jnp.arange(logits.shape[-1]) == index, -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1).astype(jnp.int32)


def _chosen_experts(tokens, weights, chosen, experts, config: ModelConfig):
    """Each token's experts, taken out of the stack: no other weight is read."""
    copies = jax.tree.map(lambda leaf: leaf[chosen.reshape(-1)], experts)
    rows = jnp.repeat(tokens, chosen.shape[1], axis=0)[:, None]
    outputs = jax.vmap(mlp, in_axes=(0, 0, None))(rows, copies, config).astype(jnp.float32)
    return jnp.sum(outputs.reshape(*chosen.shape, -1) * weights[..., None], axis=1)


def _every_expert(tokens, weights, chosen, experts, config: ModelConfig):
    """All experts for all tokens, then those chosen: each weight is read once."""
    outputs = jax.vmap(mlp, in_axes=(None, 0, None))(tokens, experts, config).astype(jnp.float32)
    share = jnp.sum(jax.nn.one_hot(chosen, experts["down"]["weight"].shape[0]) * weights[..., None], axis=1).T[
        ..., None
    ]
    # Not zero times the output: an expert may overflow on a token that it was not meant for.
    return jnp.sum(jnp.where(share > 0, share * outputs, 0), axis=0)


def _grouped(tokens, weights, chosen, experts, config: ModelConfig):
    """Pairs of a token and an expert, sorted by expert and cut into blocks of one expert each.

    With blocks of 2, where the tokens 0, 1, 2 chose the experts (0, 2), (2, 0), (2, 1):

        expert   0      1      2      2
        tokens   0 1    2 -    0 1    2 -
    """
    choices, num_experts = chosen.shape[1], experts["down"]["weight"].shape[0]
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
