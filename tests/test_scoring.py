"""Dense passes: scores, gradients, and a training loop through `generate` and `score`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsjax
from dsjax.generation import _generate
from dsjax.transformer import dense_score


def test_score_equals_the_log_probabilities_of_generate(tiny_params):
    prompts = [[9, 8, 7], [11] * 30, list(range(6, 66))]
    out = dsjax.generate(tiny_params, prompts, max_new_tokens=10, key=jax.random.key(0), temperature=1.0, n=2)
    texts = [
        prompt + out.tokens[i, j, : out.lengths[i, j]].tolist() for i, prompt in enumerate(prompts) for j in range(2)
    ]
    scores = dsjax.score(tiny_params, texts)
    for k, text in enumerate(texts):
        i, j = divmod(k, 2)
        begin = len(prompts[i])
        np.testing.assert_allclose(scores[k, begin : len(text)], out.logprobs[i, j, : len(text) - begin], atol=1e-4)
        assert scores[k, 0] == 0 and not scores[k, len(text) :].any()


def test_score_in_blocks_is_the_log_softmax(tiny_params, rng):
    """More rows than one block, and a rest."""
    tokens = rng.integers(0, 97, (9, 130)).astype(np.int32)
    expected = jax.nn.log_softmax(dsjax.logits(tiny_params, tokens))[:, :-1]
    expected = jnp.take_along_axis(expected, tokens[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(dsjax.score(tiny_params, tokens)[:, 1:], expected, atol=1e-5)


def test_score_never_holds_all_logits(tiny_config):
    """Nor does its gradient: a block of rows at a time, made again in the backward pass."""
    params = dsjax.abstract(dataclasses.replace(tiny_config, vocab_size=16384))
    tokens, lengths = jax.ShapeDtypeStruct((64, 64), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params, *texts: dense_score(params, *texts).sum()))
    for program in (dense_score, gradient):
        temporary = program.lower(params, tokens, lengths).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 64 * 64 * 16384 * 4 / 2


def test_gradient_equals_transformers(tmp_path, rng):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )
    model.save_pretrained(tmp_path)
    params = dsjax.load(tmp_path)
    tokens = rng.integers(0, 89, (2, 17)).astype(np.int32)
    weights = rng.normal(size=(2, 16)).astype(np.float32)

    logits = model(torch.tensor(tokens).long()).logits[:, :-1]
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens).long()[:, 1:, None])[..., 0]
    (chosen * torch.tensor(weights)).sum().backward()
    grads = jax.grad(lambda p: jnp.sum(dsjax.score(p, tokens)[:, 1:] * weights))(params)

    layer, theirs = grads["layers"]["1"], model.model.layers[1]
    for mine, other in (
        (grads["embed"]["weight"], model.model.embed_tokens.weight),
        (grads["head"]["weight"], model.lm_head.weight),
        (grads["final_norm"]["scale"], model.model.norm.weight),
        (layer["attention"]["q"]["weight"], theirs.self_attn.q_proj.weight),
        (layer["attention"]["v"]["weight"], theirs.self_attn.v_proj.weight),
        (layer["mlp"]["gate"]["weight"], theirs.mlp.gate_proj.weight),
        (layer["mlp"]["down"]["weight"], theirs.mlp.down_proj.weight),
        (layer["attention_norm"]["scale"], theirs.input_layernorm.weight),
    ):
        np.testing.assert_allclose(mine, other.grad.numpy(), rtol=1e-3, atol=1e-4)


def test_reinforce_raises_its_reward_with_one_compilation(tiny_config):
    """Ten steps of policy gradient from live parameters: the reward is the share of even tokens."""
    params = dsjax.init(tiny_config, jax.random.key(1))
    optimizer = optax.adam(2e-2)
    state = optimizer.init(params)
    prompts = np.full((8, 4), 9, np.int32)

    @jax.jit
    def learn(params, state, key):
        out = dsjax.generate(params, prompts, max_new_tokens=8, key=key, temperature=1.0, n=4, ignore_eos=True)
        said = out.tokens.reshape(32, 8)
        reward = jnp.mean(said % 2 == 0, axis=1)
        texts = jnp.concatenate([jnp.repeat(prompts, 4, axis=0), said], axis=1)

        def loss(params):
            return -jnp.mean((reward - reward.mean()) * dsjax.score(params, texts)[:, 4:].sum(1))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state, reward.mean()

    rewards = []
    for step in range(10):
        params, state, reward = learn(params, state, jax.random.key(step))
        rewards.append(float(reward))
    assert learn._cache_size() == 1
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.2, rewards

    run = functools.partial(dsjax.generate, max_new_tokens=8, ignore_eos=True)
    run(params, prompts)
    programs = _generate._cache_size()
    run(jax.tree.map(lambda leaf: leaf + 0.1, params), prompts)
    assert _generate._cache_size() == programs


@pytest.mark.parametrize("fused", [False, True])
def test_lengths_and_padding_do_not_matter(fused, tiny_params):
    params = dsjax.prepare(tiny_params) if fused else tiny_params
    short = dsjax.score(params, [[9, 8, 7]])
    padded = dsjax.score(params, np.array([[9, 8, 7, 50, 60]], np.int32), np.array([3]))
    np.testing.assert_allclose(short[:, :3], padded[:, :3], atol=1e-5)
    assert not padded[:, 3:].any()
