"""The one transformer: a decoder over flat tokens, driven by its config, with attention given as a function.

Dense and ragged passes differ only in what they do with queries, keys and values. Each layer is traced once for all
layers alike (an inner `jit`, inlined by the compiler), and layers are unrolled over separate leaves: a scan over
stacked weights would copy every layer's weights out of the stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.layers import rope
from dsjax.layers.attention import dense_attention, project_qkv
from dsjax.layers.linear import embed, head, linear
from dsjax.layers.mlp import mlp
from dsjax.layers.norm import rms_norm
from dsjax.params import Params
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.pages import KVPages, write_rows
from pallas_kernels.ragged_paged_attention import ragged_paged_attention

SCORE_ROWS = 256  # rows of logits alive at once in `score`


def _block(module, x, config: ModelConfig, angle, attend):
    """One layer: norm, attention, norm, feed-forward, each added to the residual stream.

    `attend(q, k, v)` gives the attention output and whatever it has to hand on.
    """
    with jax.named_scope("attention"):
        normed = rms_norm(x, module["attention_norm"]["scale"], config.norm_eps)
        q, k, v = project_qkv(normed, module["attention"], config, angle)
        out, carried = attend(q, k, v)
        x += linear(out.reshape(*x.shape[:-1], -1), module["attention"]["out"])
    with jax.named_scope("mlp"):
        x += mlp(rms_norm(x, module["mlp_norm"]["scale"], config.norm_eps), module["mlp"], config)
    return x, carried


@functools.partial(jax.jit, static_argnames=("config", "window"))
def _dense_layer(module, x, angle, config: ModelConfig, window: int | None):
    return _block(module, x, config, angle, lambda q, k, v: (dense_attention(q, k, v, window), None))[0]


@functools.partial(jax.jit, static_argnames=("config", "window", "max_q_len"))
def _ragged_layer(module, x, angle, keys, values, page, offset, batch, config, window, max_q_len):
    def attend(q, k, v):
        new_keys, new_values = write_rows(keys, k, page, offset), write_rows(values, v, page, offset)
        table, lengths = batch.page_table, (batch.cu_q_lens, batch.kv_lens)
        q = q.astype(keys.dtype)
        out = ragged_paged_attention(q, new_keys, new_values, table, *lengths, window=window, max_q_len=max_q_len)
        return out.astype(x.dtype), (new_keys, new_values)

    return _block(module, x, config, angle, attend)


def forward(
    params: Params, batch: RaggedBatch, pages: KVPages, *, max_q_len: int | None = None
) -> tuple[Float[Array, "R V"], KVPages]:
    """The ragged forward pass: write the batch's keys and values into the pages, attend over them, give logits.

    Args:
      params: parameter tree, fused or not.
      batch: `T` tokens of `S` slots.
      pages: the pool; donate it, it is updated in place.
      max_q_len: most tokens a slot that the batch may hold; 1 compiles a step that only decodes.

    Returns:
      Logits in float32 of the rows that the batch names, and the pool.
    """
    config = params.config
    angle = rope.phases(batch.positions, config)
    slots, pages_per_slot = batch.page_table.shape
    column = jnp.minimum(batch.positions // pages.page_size, pages_per_slot - 1)
    # Padding has slot S: out of range, filled with page P, to which nothing is written.
    page = batch.page_table.at[batch.slot_of_token, column].get(mode="fill", fill_value=pages.num_pages)
    offset = batch.positions % pages.page_size

    with jax.named_scope("embed"):
        x = embed(batch.tokens, params["embed"]["weight"])
    keys, values = list(pages.keys), list(pages.values)
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            x, (keys[i], values[i]) = _ragged_layer(
                params["layers"][str(i)],
                x,
                angle,
                keys[i],
                values[i],
                page,
                offset,
                batch,
                config=config,
                window=config.window(i),
                max_q_len=max_q_len,
            )
    with jax.named_scope("head"):
        x = rms_norm(x[batch.logit_rows], params["final_norm"]["scale"], config.norm_eps)
        return head(x, params), KVPages(tuple(keys), tuple(values))


def hidden_states(params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Final normed hidden states of right-padded rows, causal and dense; padding changes nothing before it."""
    config = params.config
    angle = rope.phases(jnp.arange(tokens.shape[1]), config)
    x = embed(tokens, params["embed"]["weight"])
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            x = _dense_layer(params["layers"][str(i)], x, angle, config=config, window=config.window(i))
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps)


@jax.jit
def dense_logits(params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    """Logits in float32 at every position."""
    return head(hidden_states(params, tokens), params)


@jax.jit
def dense_score(params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Log-probability of each token given those before it, float32; 0 for the first.

    Logits are made and dropped a block of rows at a time, in the backward pass again, so memory does not grow as
    `B * L * V`.
    """
    batch, length = tokens.shape
    rows = hidden_states(params, tokens)[:, :-1].reshape(batch * (length - 1), -1)

    @jax.checkpoint
    def one(row_and_target: tuple[Any, Any]):
        row, target = row_and_target
        logits = head(row[None], params)[0]
        return logits[target] - jax.nn.logsumexp(logits)

    scores = lax.map(one, (rows, tokens[:, 1:].reshape(-1)), batch_size=min(SCORE_ROWS, max(rows.shape[0], 1)))
    return jnp.pad(scores.reshape(batch, length - 1), ((0, 0), (1, 0)))
