"""The one transformer over flat tokens, driven by its config, with attention given as a function.

Dense and ragged passes differ only in what they do with queries, keys and values. Each layer is traced once for all
layers alike (an inner `jit`, inlined by the compiler), and layers are unrolled over separate leaves: a scan over
stacked weights would copy every layer's weights out of the stack.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from dsjax.config import Layer, ModelConfig
from dsjax.errors import ConfigError
from dsjax.layers import rope
from dsjax.layers.attention import Ragged, attend_dense, attend_ragged
from dsjax.layers.latent import latent_dense, latent_ragged
from dsjax.layers.linear import embed, head, linear
from dsjax.layers.mlp import mlp
from dsjax.layers.moe import moe
from dsjax.params import Params
from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.pages import KVPages
from pallas_kernels.add_norm import add_norm

SCORE_ROWS = 256  # rows of logits alive at once in `score`

# What a layer hands to the next to be added to the residual stream, and the norm that it passes before, if it does.
Update = tuple[jax.Array, dict[str, Any]] | None


def _merge(
    x: jax.Array, update: Update, module: dict[str, Any] | None, config: ModelConfig, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    """Add an update to the residual stream, and norm the sum for what comes next.

    One kernel, since the norm reads what the addition writes.

    Args:
      x: residual stream.
      update: what is to be added.
      module: leaves of the norm that follows; `None` where none does.
      config: where the model has norms, and which.
      implementation: backend of the kernel.

    Returns:
      The residual stream, and what comes next is to read.
    """
    options: dict[str, Any] = {"eps": config.norm_eps, "offset": config.norm_offset, "implementation": implementation}
    if config.norm_placement == "post":
        if update is None:
            return x, x
        added, after = update
        _, x = add_norm(x, added, **after, kind=config.norm, **options)
        return x, x
    added = None
    if update is not None:
        added, after = update
        options["multiplier"] = config.residual_multiplier
        if config.norm_placement != "pre":
            options |= {f"update_{name}": leaf for name, leaf in after.items()} | {"update_kind": config.norm}
    if module is None:
        return (x, x) if added is None else add_norm(x, added, kind=None, **options)
    return add_norm(x, added, **module, kind=config.norm, **options)


def _block(module, x, update: Update, config: ModelConfig, layer: Layer, attend: Callable, implementation):
    """One layer: attention and feed-forward, each with its norms.

    What the layer before adds to the residual stream `x` comes as `update`: adding is left to the norm that follows,
    which reads both anyway. The same holds for what comes back. `attend(normed)` gives the heads' outputs and whatever
    it has to hand on.
    """

    def norm_of(name: str, exists: bool) -> dict[str, Any] | None:
        return module.get(name, {}) if exists else None

    def feed_forward(normed):
        network = moe if layer.experts else mlp
        return network(normed, module["mlp"], config, implementation)

    with jax.named_scope("attention"):
        x, normed = _merge(x, update, norm_of("attention_norm", layer.attention_norm), config, implementation)
        out, carried = attend(normed)
        out = linear(out.reshape(*x.shape[:-1], -1), module["attention"]["out"], implementation, partial=True)
    if config.parallel_block:
        with jax.named_scope("mlp"):
            if not config.shared_norm:
                _, normed = _merge(x, None, norm_of("mlp_norm", True), config, implementation)
            return x, (_together(out, feed_forward(normed), x.ndim), {}), carried
    with jax.named_scope("mlp"):
        before = norm_of("mlp_norm", config.norm_placement in ("pre", "both"))
        x, normed = _merge(x, (out, module.get("attention_post_norm", {})), before, config, implementation)
        return x, (feed_forward(normed), module.get("mlp_post_norm", {})), carried


def _together(first: jax.Array, second: jax.Array, ndim: int) -> jax.Array:
    """The sum of two updates, either of which may be in parts along a first axis."""
    if first.ndim == second.ndim == ndim:
        return first + second
    parts = [update.reshape(-1, *update.shape[update.ndim - ndim :]) for update in (first, second)]
    return jnp.concatenate([part.astype(jnp.float32) for part in parts])


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _dense_layer(module, x, update, angle, lengths, config: ModelConfig, layer: Layer):
    attention = attend_dense if config.latent is None else latent_dense

    def attend(normed):
        return attention(normed, module["attention"], config, layer, angle, lengths), None

    return _block(module, x, update, config, layer, attend, "xla")[:2]


@functools.partial(jax.jit, static_argnames=("config", "layer", "max_q_len", "implementation"))
def _ragged_layer(module, x, update, angle, pages, page, offset, batch, config, layer, max_q_len, implementation):
    # Mosaic has a kernel for attention of prompts alone.
    kernels = "triton" if implementation == "mosaic" else implementation
    ragged = Ragged(batch, page, offset, max_q_len, kernels, kernels if max_q_len == 1 else implementation)
    attention = attend_ragged if config.latent is None else latent_ragged

    def attend(normed):
        return attention(normed, module["attention"], config, layer, angle, pages, ragged)

    return _block(module, x, update, config, layer, attend, kernels)


def _angles(positions: Int[Array, "*batch"], lengths: Int[Array, "*batch"] | None, config: ModelConfig):
    """Phases by the kind of rotation that layers have."""
    kinds = {config.layer(i).rotary for i in range(config.num_layers)}
    return {
        kind: kind and rope.phases(positions, config, local=kind == "local", lengths=lengths)
        for kind in ("global", "local", None)
        if kind in kinds
    }


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

    Raises:
      ConfigError: the model is an encoder, so nothing can be generated, or `batch` lacks lengths that it needs.
    """
    params.config.require_head()
    x, update, pages = _ragged_layers(params, batch, pages, max_q_len, implementation)
    with jax.named_scope("head"):
        if update is not None:
            update = update[0][..., batch.logit_rows, :], update[1]
        x = _final(x[..., batch.logit_rows, :], update, params)
        return head(x, params, params.config, implementation), pages


def ragged_rows(
    params: Params,
    batch: RaggedBatch,
    pages: KVPages,
    *,
    max_q_len: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], KVPages]:
    """Hidden states of all tokens of a ragged batch as they enter the head; else as `forward`."""
    x, update, pages = _ragged_layers(params, batch, pages, max_q_len, implementation)
    with jax.named_scope("head"):
        return _final(x, update, params), pages


def _ragged_layers(params: Params, batch: RaggedBatch, pages: KVPages, max_q_len, implementation):
    """The residual stream after all layers, what is still to be added to it, and the pages."""
    config = params.config
    lengths = None
    if config.scales_by_length:
        if batch.final_lens is None:
            raise ConfigError(
                "this model's rotary frequencies depend on the length of a sequence: give batch.final_lens"
            )
        lengths = batch.final_lens.at[batch.slot_of_token].get(mode="clip")
    angles = _angles(batch.positions, lengths, config)
    # What a layer sees depends on its group: the batch with the table, and the page that each token is written to.
    # Padding has slot S: out of range, filled with page P, to which nothing is written.
    tables = jnp.split(batch.page_table, pages.groups.count, axis=1)
    column = jnp.minimum(batch.positions // pages.page_size, tables[0].shape[1] - 1)
    seen = [
        (
            dataclasses.replace(batch, page_table=table),
            table.at[batch.slot_of_token, column].get(mode="fill", fill_value=pages.num_pages),
        )
        for table in tables
    ]
    offset = batch.positions % pages.page_size

    with jax.named_scope("embed"):
        x = embed(batch.tokens, batch.positions, params, config)
    update: Update = None
    buffers = pages.buffers()
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            layer = config.layer(i)
            group, buffer = pages.groups.places[i] if pages.groups.places else (0, i)
            of_group, page = seen[group]
            x, update, buffers[buffer] = _ragged_layer(
                params["layers"][str(i)],
                x,
                update,
                angles[layer.rotary],
                buffers[buffer],
                page,
                offset,
                of_group,
                config=config,
                layer=layer,
                max_q_len=max_q_len,
                implementation=implementation,
            )
    return x, update, pages.with_buffers(buffers)


def _final(x, update: Update, params: Params):
    norm = params.get("final_norm", {}) if params.config.final_norm else None
    return _merge(x, update, norm, params.config, "xla")[1]


def hidden_states(
    params: Params,
    tokens: Int[Array, "B L"],
    lengths: Int32[Array, "B"] | None = None,
    token_types: Int[Array, "B L"] | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states of right-padded rows as they enter the head, dense; padding changes nothing before it.

    Args:
      params: parameter tree.
      tokens: right-padded rows.
      lengths: how many of each are real, default all. What comes before padding does not see it if the model is causal.
      token_types: segment of each token, in models that tell segments apart.
    """
    return encode_rows(params, embed(tokens, jnp.arange(tokens.shape[1]), params, params.config, token_types), lengths)


def encode_rows(
    params: Params, x: Float[Array, "B L D"], lengths: Int32[Array, "B"] | None = None
) -> Float[Array, "B L D"]:
    """All layers over what was embedded, and the norm after them; see `hidden_states`."""
    config = params.config
    positions = jnp.arange(x.shape[1])
    if config.scales_by_length:
        of_rows = jnp.full(x.shape[0], x.shape[1]) if lengths is None else lengths
        positions, of_rows = jnp.broadcast_arrays(positions[None], of_rows[:, None])
        angles = _angles(positions, of_rows, config)
    else:
        angles = _angles(positions, None, config)
    update = None
    seen = None if config.causal else lengths
    for i in range(config.num_layers):
        with jax.named_scope(f"layer_{i}"):
            layer = config.layer(i)
            angle = angles[layer.rotary]
            x, update = _dense_layer(params["layers"][str(i)], x, update, angle, seen, config=config, layer=layer)
    return _final(x, update, params)


@jax.jit
def dense_logits(params: Params, tokens: Int[Array, "B L"], lengths: Int32[Array, "B"]) -> Float[Array, "B L V"]:
    """Logits in float32 at every position."""
    return head(hidden_states(params, tokens, lengths), params, params.config)


@jax.jit
def dense_score(params: Params, tokens: Int[Array, "B L"], lengths: Int32[Array, "B"]) -> Float[Array, "B L"]:
    """Log-probability of each token given those before it, float32; 0 for the first.

    Logits are made and dropped a block of rows at a time, in the backward pass again, so memory does not grow as
    `B * L * V`.
    """
    batch, length = tokens.shape
    rows = hidden_states(params, tokens, lengths)[:, :-1].reshape(batch * (length - 1), -1)

    @jax.checkpoint
    def one(row_and_target: tuple[Any, Any]):
        row, target = row_and_target
        logits = head(row[None], params, params.config)[0]
        return logits[target] - jax.nn.logsumexp(logits)

    scores = lax.map(one, (rows, tokens[:, 1:].reshape(-1)), batch_size=min(SCORE_ROWS, max(rows.shape[0], 1)))
    return jnp.pad(scores.reshape(batch, length - 1), ((0, 0), (1, 0)))
