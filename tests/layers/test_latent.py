"""Latent attention against torch in float64 with keys and values expanded, and through its compressed cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dsjax
from dsjax.config import Latent, ModelConfig
from dsjax.layers import rope
from dsjax.layers.attention import Ragged
from dsjax.layers.latent import latent_dense, latent_ragged
from dsjax.memory import kv_bytes

LATENT = Latent(kv_rank=12, query_rank=10, rope_size=8, nope_size=6, value_size=5)
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=14,
    max_context=256,
    rotary_interleaved=True,
    attention_scale=0.4,
    latent=LATENT,
)
DIRECT = dataclasses.replace(CONFIG, latent=dataclasses.replace(LATENT, query_rank=None), rotary_interleaved=False)
BIASES = dataclasses.replace(CONFIG, attention_bias=True)


def module_of(config, rng):
    """Random leaves of one layer's attention."""
    shapes = dsjax.abstract(config)["layers"]["0"]["attention"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3 + 0.1, jnp.float32), shapes)


def reference(x, module, config):
    """One row; keys and values of each head written out, in float64."""
    latent = config.latent

    def linear(x, name):
        y = x @ module[name]["weight"].T
        return y + module[name]["bias"] if "bias" in module[name] else y

    def normed(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + latent.norm_eps) * module[name]["scale"]

    def turned(x):
        pairs = latent.rope_size // 2
        angle = torch.arange(len(x))[:, None] * config.rope_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        turn = torch.polar(torch.ones_like(angle), angle).reshape(len(x), *(1,) * (x.ndim - 2), pairs)
        if config.rotary_interleaved:
            parts = torch.view_as_complex(x.reshape(*x.shape[:-1], pairs, 2).contiguous())
            return torch.view_as_real(parts * turn).flatten(-2)
        parts = torch.complex(x[..., :pairs], x[..., pairs:]) * turn
        return torch.cat([parts.real, parts.imag], dim=-1)

    queries = x if latent.query_rank is None else normed(linear(x, "q_down"), "q_down_norm")
    queries = linear(queries, "q").reshape(len(x), config.num_heads, -1)
    down = linear(x, "kv_down")
    compressed, key = normed(down[:, : latent.kv_rank], "kv_down_norm"), turned(down[:, latent.kv_rank :])
    heads = []
    for n, query in enumerate(queries.unbind(1)):
        keys, values = (
            module[name]["weight"].reshape(config.num_heads, -1, latent.kv_rank)[n] for name in ("k_up", "v_up")
        )
        scores = query[:, : latent.nope_size] @ (compressed @ keys.T).T
        scores = (scores + turned(query[:, latent.nope_size :]) @ key.T) * config.layer(0).scale
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ compressed @ values.T)
    return torch.stack(heads, dim=1)


def in_torch(tree):
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=True), tree)


@pytest.mark.parametrize("config", [CONFIG, DIRECT, BIASES], ids=["plain", "direct", "biases"])
def test_values_and_gradients_equal_torch(config, rng):
    module, x = module_of(config, rng), jnp.asarray(rng.normal(size=(2, 11, 32)), jnp.float32)
    weights = rng.normal(size=(2, 11, 4, 5))
    angle = rope.phases(jnp.arange(11), config)

    def attend(x, module):
        return latent_dense(x, module, config, config.layer(0), angle, None)

    def loss(x, module):
        out = attend(x, module)
        return jnp.sum(out * jnp.asarray(weights, jnp.float32)), out

    (grad_x, grads), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, module)
    wide_x, wide = in_torch((x, module))
    right = torch.stack([reference(row, wide, config) for row in wide_x])
    np.testing.assert_allclose(out, right.detach(), atol=1e-5)
    (right * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(grad_x, wide_x.grad, atol=1e-4)
    for name, leaves in grads.items():
        for kind, grad in leaves.items():
            if name != "out":  # applied by the caller
                assert jnp.abs(grad).max() > 1e-3
                np.testing.assert_allclose(grad, wide[name][kind].grad, atol=1e-4, err_msg=f"{name}.{kind}")


@pytest.mark.parametrize("config", [CONFIG, DIRECT], ids=["plain", "direct"])
def test_chunks_through_the_cache_equal_the_whole_text(config, rng):
    module, x = module_of(config, rng), jnp.asarray(rng.normal(size=(1, 14, 32)), jnp.float32)
    expected = latent_dense(x, module, config, config.layer(0), rope.phases(jnp.arange(14), config), None)[0]
    cache = dsjax.KVPages.zeros(config, 6, 4, jnp.float32)
    assert cache.values == () and cache.keys[0].shape == (6, 1, 4, 12 + 8)
    pages, table = cache.buffers()[0], jnp.array([[4, 1, 5, 2]], jnp.int32)

    @jax.jit
    def step(rows, pages, start, count):
        positions = start + jnp.arange(len(rows))
        real = jnp.arange(len(rows)) < count
        batch = dsjax.RaggedBatch(
            tokens=jnp.zeros(len(rows), jnp.int32),
            positions=positions,
            slot_of_token=jnp.where(real, 0, 1),
            cu_q_lens=jnp.stack([0, count]),
            kv_lens=jnp.stack([start + count]),
            page_table=table,
            logit_rows=jnp.arange(len(rows)),
        )
        page = jnp.where(real, table.at[0, positions // 4].get(mode="clip"), 6)  # 6 pages: 6 is none
        ragged = Ragged(batch, page, positions % 4, None, "xla", "xla")
        return latent_ragged(rows, module, config, config.layer(0), rope.phases(positions, config), pages, ragged)

    for start, stop in ((0, 9), (9, 13), (13, 14)):
        rows = jnp.pad(x[0, start:stop], ((0, 9 - (stop - start)), (0, 0)))
        out, pages = step(rows, pages, start, stop - start)
        np.testing.assert_allclose(out[: stop - start], expected[start:stop], atol=1e-5)
    assert not np.asarray(pages[0])[[0, 3]].any(), "no page is touched that is not the sequence's"


def test_generation_with_too_few_pages_and_two_samples():
    """Pages of one buffer are copied, preempted and shared as pairs are: tokens are as likely as in the whole text."""
    params = dsjax.init(dataclasses.replace(CONFIG, num_layers=1), jax.random.key(0))
    params["head"]["weight"] *= 4
    prompts = np.random.default_rng(0).integers(6, 97, (4, 30)).astype(np.int32)
    lengths, new = np.array([30, 7, 19, 12], np.int32), 12
    out = dsjax.generate(
        params,
        prompts,
        lengths,
        max_new_tokens=new,
        n=2,
        key=jax.random.key(1),
        temperature=np.array([0.0, 1.0, 1.0, 1.0], np.float32),
        slots=5,
        token_budget=16,
        page_size=8,
        pages=9,
    )
    assert out.counters.preemptions > 0
    tokens = np.asarray(out.tokens)
    texts = np.zeros((4, 2, 30 + new), np.int32)
    texts[:, :, :30] = prompts[:, None]
    for text, length, sampled in zip(texts, lengths, tokens, strict=True):
        text[:, length : length + new] = sampled
    logprobs = jax.nn.log_softmax(dsjax.logits(params, texts.reshape(8, -1))).reshape(4, 2, 30 + new, -1)
    for i, length in enumerate(lengths):
        likely = np.asarray(logprobs[i, :, length - 1 : length - 1 + new])
        chosen = np.take_along_axis(likely, tokens[i, ..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(out.logprobs[i], chosen, atol=1e-4)
        if i == 0:
            np.testing.assert_array_equal(tokens[0], likely.argmax(-1))
    assert (tokens[1, 0] != tokens[1, 1]).any(), "samples are drawn apart"


def test_bytes_of_a_token():
    pages = dsjax.KVPages.zeros(CONFIG, 1, 1, jnp.bfloat16)
    assert kv_bytes(CONFIG, jnp.bfloat16) == sum(leaf.nbytes for leaf in jax.tree.leaves(pages)) == 2 * 20 * 2
