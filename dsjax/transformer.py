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
from dsjax.layers.attention import attend_dense, project_qkv
from dsjax.layers.linear import embed, head, linear
from dsjax.layers.mlp import mlp
from dsjax.layers.moe import moe
from dsjax.params import Params
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.pages import KVPages
from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.ragged_paged_attention import cascade_attention, ragged_paged_attention
from pallas_kernels.rotary_page_write import rotary_page_write

SCORE_ROWS = 256  # rows of logits alive at once in `score`


def _block(module, x, update, config: ModelConfig, attend, implementation):
    """One layer: norm, attention, norm, feed-forward.

    `update` is what the layer before adds to the residual stream `x`. Adding is left to the norm that follows, which
    reads both anyway; the same holds for what comes back. `attend(qkv)` gives the attention output and whatever it has
    to hand on.
    """
    norm = functools.partial(add_rms_norm, eps=config.norm_eps, implementation=implementation)
    with jax.named_scope("attention"):
        x, normed = norm(x, update, module["attention_norm"]["scale"])
        out, carried = attend(project_qkv(normed, module["attention"], config, implementation))
        update = linear(out.reshape(*x.shape[:-1], -1), module["attention"]["out"], implementation, partial=True)
    with jax.named_scope("mlp"):
        x, normed = norm(x, update, module["mlp_norm"]["scale"])
        if config.num_experts:
            update = moe(normed, module["mlp"], config)
        else:
            update = mlp(normed, module["mlp"], config, implementation)
    return x, update, carried


@functools.partial(jax.jit, static_argnames=("config", "window"))
def _dense_layer(module, x, update, angle, config: ModelConfig, window: int | None):
    def attend(qkv):
        return attend_dense(qkv, module["attention"], config, angle, window), None

    return _block(module, x, update, config, attend, "xla")[:2]


@functools.partial(jax.jit, static_argnames=("config", "window", "max_q_len", "implementation"))
def _ragged_layer(
    module, x, update, angle, keys, values, page, offset, batch, config, window, max_q_len, implementation
):
    # Mosaic has a kernel for attention of prompts alone.
    kernels = "triton" if implementation == "mosaic" else implementation
    attention = kernels if max_q_len == 1 else implementation

    def attend(qkv):
        cos, sin = angle
        norms = {name: module["attention"][name]["scale"] for name in ("q_norm", "k_norm") if config.qk_norm}
        q, new_keys, new_values, _, _ = rotary_page_write(
            qkv,
            keys,
            values,
            page,
            offset,
            cos=cos,
            sin=sin,
            q_dtype=x.dtype,
            **norms,
            norm_eps=config.norm_eps,
            implementation=kernels,
        )
        q, table, lengths = q.astype(keys.dtype), batch.page_table, (batch.cu_q_lens, batch.kv_lens)
        options = {"max_q_len": max_q_len, "implementation": attention}
        if batch.shared is not None and window is None:
            out = cascade_attention(q, new_keys, new_values, table, *lengths, batch.shared, **options)
        else:
            out = ragged_paged_attention(q, new_keys, new_values, table, *lengths, window=window, **options)
        return out.astype(x.dtype), (new_keys, new_values)

    return _block(module, x, update, config, attend, kernels)


def forward(
    params: Params,
    batch: RaggedBatch,
    pages: KVPages,
    *,
    max_q_len: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "R V"], KVPages]:
    """The ragged forward pass: write the batch's keys and values into the pages, attend over them, give logits.

    Args:
      params: parameter tree, fused or not.
      batch: `T` tokens of `S` slots.
      pages: the pool; donate it, it is updated in place.
      max_q_len: most tokens a slot that the batch may hold; 1 compiles a step that only decodes.
      implementation: backend of the kernels, `"mosaic"`, `"triton"`, `"xla"` or `"reference"`; `None` for the best that
        the GPU runs. On a CPU `"triton"` is interpreted.

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
    update = None
    keys, values = list(pages.keys), list(pages.values)
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            x, update, (keys[i], values[i]) = _ragged_layer(
                params["layers"][str(i)],
                x,
                update,
                angle,
                keys[i],
                values[i],
                page,
                offset,
                batch,
                config=config,
                window=config.window(i),
                max_q_len=max_q_len,
                implementation=implementation,
            )
    with jax.named_scope("head"):
        x, update = jax.tree.map(lambda rows: rows[..., batch.logit_rows, :], (x, update))
        _, x = add_rms_norm(x, update, params["final_norm"]["scale"], eps=config.norm_eps, implementation="xla")
        return head(x, params), KVPages(tuple(keys), tuple(values))


def hidden_states(params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Final normed hidden states of right-padded rows, causal and dense; padding changes nothing before it."""
    config = params.config
    angle = rope.phases(jnp.arange(tokens.shape[1]), config)
    x, update = embed(tokens, params["embed"]["weight"]), None
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            x, update = _dense_layer(params["layers"][str(i)], x, update, angle, config=config, window=config.window(i))
    return add_rms_norm(x, update, params["final_norm"]["scale"], eps=config.norm_eps, implementation="xla")[1]


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
