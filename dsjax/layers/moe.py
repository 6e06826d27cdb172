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
from dsjax.quantization import QuantizedArray
from pallas_kernels.dispatch import prefers_kernels
from pallas_kernels.few_row_matmul import MAX_ROWS, few_row_matmul
from pallas_kernels.grouped_matmul import (
    MAX_PAIRS,
    QuantizedExperts,
    Routing,
    activate,
    choose_experts,
    grouped_matmul,
    plan_experts,
)

# A decode step is bound by reading weights, and more than a few tokens need every expert's. So a GPU without kernels
# computes all experts for all tokens: plain products, no loop. Beyond this many, arithmetic and memory count, and
# blocks pay; with kernels, beyond this many the experts' outputs are kept in the dtype of the model.
FEW_TOKENS = 512
# Of many experts a token or two need few: these are copied out of the stack. A copy is read, written and read again.
COST_OF_A_COPY = 3
# Rows of the largest block. Each block copies its expert's weights, and half of an expert's last block is padding.
LARGEST_BLOCK = 256


def moe(
    x: Float[Array, "*batch D"], module: dict[str, Any], config: ModelConfig, implementation: str | None = "xla"
) -> Float[Array, "*parts_and_batch D"]:
    """Outputs of each token's experts, weighted by the router and added up in float32.

    Experts have no capacity, so what a token gets does not depend on the others.

    Args:
      x: activations.
      module: `router`, `experts`: the leaves of `mlp`, each with an axis `E` in front; and where the model has a
        network that all tokens pass, `shared` and what mixes it in.
      config: the architecture.
      implementation: `"xla"` for plain operations, which are differentiable; else what `grouped_matmul` takes, whose
        kernel reads only the weights of experts that some token chose, and copies none.

    Returns:
      The sum, in the dtype of `x`; or, from kernels, the outputs of each token's experts, `[per_token, *batch, D]`,
      which the norm that follows adds up as it reads them.
    """
    experts = config.experts
    assert experts is not None
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(tokens, module["router"], experts, implementation)
    has_kernels = all(_for_kernels(leaf, x.dtype) is not None for leaf in module["experts"].values())
    if has_kernels and prefers_kernels(implementation):
        parts = _planned(tokens, weights, chosen, module["experts"], config, implementation)
        if not experts.shared_size:
            return parts.reshape(-1, *x.shape)
        out = parts.sum(axis=0, dtype=jnp.float32)
        return _with_shared(out, tokens, module, config, implementation).astype(x.dtype).reshape(x.shape)
    arguments = tokens, weights, chosen, module["experts"]
    grouped = functools.partial(_grouped, config=config)
    if tokens.shape[0] <= FEW_TOKENS:
        on_gpu = _chosen_experts if COST_OF_A_COPY * chosen.size <= experts.count else _every_expert
        out = lax.platform_dependent(*arguments, cpu=grouped, default=functools.partial(on_gpu, config=config))
    else:
        out = grouped(*arguments)
    if experts.shared_size:
        out = _with_shared(out, tokens, module, config, "xla")
    return out.astype(x.dtype).reshape(x.shape)


def _with_shared(
    out: Float[Array, "T D"], tokens, module, config: ModelConfig, implementation: str | None
) -> Float[Array, "T D"]:
    """The experts' sum and the shared network's output, mixed; float32."""
    assert config.experts is not None
    mix = config.experts.shared_mix
    shared = mlp(tokens, module["shared"], config, implementation).astype(jnp.float32)
    if shared.ndim > out.ndim:
        shared = shared.sum(axis=0)
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
    x: Float[Array, "T D"], module: dict[str, Any], experts: Experts, implementation: str | None = "xla"
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Weights in float32 and numbers of each token's experts; of equally likely ones, the lower number comes first.

    Args:
      x: activations.
      module: the router's `weight [E, D]`, plain or quantized, and, where it has them, `bias [E]`, `correction [E]`.
      experts: how to choose.
      implementation: as in `moe`.
    """
    has_kernels = prefers_kernels(implementation)
    if has_kernels and x.shape[0] <= MAX_ROWS and not isinstance(module["weight"], QuantizedArray):
        weight = module["weight"].astype(x.dtype)
        logits = few_row_matmul(x, weight, partial=True, implementation=implementation)
    else:
        logits = matmul(x, module["weight"], jnp.float32)
    if experts.score == "sparsemixer":
        logits = logits.reshape(-1, *logits.shape[-2:]).sum(axis=0)
        if experts.router_bias:
            logits += module["bias"].astype(jnp.float32)
        return _sparsemixer(logits, experts.jitter)
    routing = Routing(
        experts.per_token,
        experts.score,
        experts.groups,
        experts.groups_per_token,
        experts.group_score,
        experts.renormalize,
        experts.scale,
    )
    return choose_experts(
        logits,
        routing,
        bias=module["bias"] if experts.router_bias else None,
        correction=module["correction"] if experts.correction else None,
        implementation=implementation if has_kernels else "xla",
    )


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


def _for_kernels(leaf: dict[str, Any], dtype: Any) -> jax.Array | QuantizedExperts | None:
    """The weight of a leaf as `grouped_matmul` takes it; `None` of those that it has no kernel for."""
    weight = leaf["weight"]
    if not isinstance(weight, QuantizedArray):
        return weight.astype(dtype)
    if weight.layout != "tiles" or weight.changes_inputs or weight.scheme.activations or dtype == jnp.float32:
        return None
    parts = weight.values, weight.scales, weight.zeros, weight.minimums, weight.tensor_scale
    return QuantizedExperts(*parts, weight.format)


def _planned(tokens, weights, chosen, experts, config: ModelConfig, implementation: str | None):
    """Products of sorted pairs, of which nothing but the plan is sorted; `[k, T, D]`, weighted."""
    planner = None if chosen.size <= MAX_PAIRS else "xla"  # said here, since one may be named for all ops at once
    plan = plan_experts(chosen, experts["down"]["weight"].shape[0], implementation=planner)

    def product(x, name, **options):
        weight, bias = _for_kernels(experts[name], tokens.dtype), experts[name].get("bias")
        assert weight is not None
        return grouped_matmul(x, weight, plan, bias=bias, implementation=implementation, **options)

    if config.gated and "gate_up" not in experts:
        both = [product(tokens, name, gather=True, dtype=jnp.float32) for name in ("gate", "up")]
        hidden = activate(jnp.concatenate(both, axis=-1), config.activation, gated=True).astype(tokens.dtype)
    else:
        name = "gate_up" if config.gated else "up"
        hidden = product(tokens, name, gather=True, activation=config.activation, gated=config.gated)
    dtype = jnp.float32 if tokens.shape[0] <= FEW_TOKENS else tokens.dtype
    return product(hidden, "down", scatter=True, scale=weights, dtype=dtype)


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
