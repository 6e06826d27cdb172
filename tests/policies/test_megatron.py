"""Megatron-LM's checkpoints, made from transformers' GPT-2, which computes the same; experts against plain torch."""

import argparse

import numpy as np
import pytest
import torch
import transformers

import dsjax
from dsjax.errors import CheckpointError, ConfigError

HEADS, WIDTH, LAYERS = 4, 32, 2
ARGS = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": 4 * WIDTH,
    "layernorm_epsilon": 1e-5,
    "bias_gelu_fusion": True,
}


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def megatron_tensors(model, version):
    """GPT-2's weights under Megatron's names, rows of q, k and v in the order of a version."""
    state = model.transformer.state_dict()
    tensors = {
        "embedding.word_embeddings.weight": state["wte.weight"],
        "embedding.position_embeddings.weight": state["wpe.weight"],
    }
    names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    names |= {"attn.c_proj": "attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            for theirs, mine in names.items():
                tensor = state[f"h.{i}.{theirs}.{kind}"]
                turned = tensor.T if tensor.ndim == 2 else tensor  # Conv1D is [in, out]
                tensors[f"transformer.layers.{i}.{mine}.{kind}"] = turned
            qkv = state[f"h.{i}.attn.c_attn.{kind}"]
            rows = (qkv.T if qkv.ndim == 2 else qkv).reshape(3, HEADS, WIDTH // HEADS, -1)
            rows = rows.permute({0: (0, 1, 2, 3), 1.0: (1, 2, 0, 3), 2.0: (1, 0, 2, 3), 3.0: (1, 0, 2, 3)}[version])
            shape = (3 * WIDTH, WIDTH) if qkv.ndim == 2 else (3 * WIDTH,)
            tensors[f"transformer.layers.{i}.attention.query_key_value.{kind}"] = rows.reshape(shape)
    for kind in ("weight", "bias"):
        tensors[f"transformer.final_layernorm.{kind}"] = state[f"ln_f.{kind}"]
    return tensors


def cut(name, tensor, rank, ranks, version):
    """What one tensor-parallel rank holds."""
    if "query_key_value" in name and version == 0:
        return tensor.reshape(3, -1, *tensor.shape[1:]).chunk(ranks, 1)[rank].reshape(-1, *tensor.shape[1:])
    if "query_key_value" in name or "dense_h_to_4h" in name or "word_embeddings" in name:
        return tensor.chunk(ranks)[rank]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(ranks, 1)[rank]
    return tensor


def save(folder, tensors, version, ranks=1, wrapper="model", **args):
    for rank in range(ranks):
        state = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            state.setdefault(group, {})[rest] = cut(name, tensor, rank, ranks, version).clone()
        inner = {"language_model": {"embedding": {}, "transformer": state["transformer"]}}
        for name, tensor in state["embedding"].items():
            inner["language_model"]["embedding"][name.split(".")[0]] = {"weight": tensor}
        whole = {wrapper: inner, "args": argparse.Namespace(**{**ARGS, **args}), "iteration": 7}
        if version:
            whole["checkpoint_version"] = version
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(whole, folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")


@pytest.mark.parametrize(("version", "ranks"), [(0, 1), (0, 2), (1.0, 2), (2.0, 1), (3.0, 4)])
def test_logits_equal_gpt2s(gpt2, tmp_path, rng, version, ranks):
    save(tmp_path / "iter_0000007", megatron_tensors(gpt2, version), version, ranks)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    tokens = rng.integers(0, 96, (2, 33))
    with torch.no_grad():
        expected = gpt2(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(dsjax.logits(dsjax.load(tmp_path), tokens), expected, atol=1e-4)


class Experts(torch.nn.Module):
    """DeepSpeed's layer of experts at inference, without its capacity: top-1 keeps its probability, top-2 share."""

    def __init__(self, mlp, count, chosen, residual):
        super().__init__()
        self.chosen, self.act = chosen, mlp.act
        self.gate = torch.nn.Linear(WIDTH, count, bias=False)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 4 * WIDTH) for _ in range(count))
        self.down = torch.nn.ModuleList(torch.nn.Linear(4 * WIDTH, WIDTH) for _ in range(count))
        self.mlp = mlp if residual else None
        self.coefficient = torch.nn.Linear(WIDTH, 2) if residual else None
        torch.nn.init.normal_(self.gate.weight)

    def forward(self, x):
        probabilities, which = self.gate(x).softmax(-1).topk(self.chosen)
        if self.chosen == 2:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        outputs = torch.stack([down(self.act(up(x))) for up, down in zip(self.up, self.down, strict=True)], -2)
        out = (outputs.gather(-2, which[..., None].expand(*which.shape, WIDTH)) * probabilities[..., None]).sum(-2)
        if self.mlp is None:
            return out
        share = self.coefficient(x).softmax(-1)
        return out * share[..., :1] + self.mlp(x) * share[..., 1:]


@pytest.mark.parametrize(("chosen", "residual"), [(1, False), (2, True)])
def test_experts_of_megatron_deepspeed(gpt2, tmp_path, rng, chosen, residual):
    import copy

    model = copy.deepcopy(gpt2)
    tensors = megatron_tensors(gpt2, 2.0)
    experts = Experts(model.transformer.h[1].mlp, 3, chosen, residual)
    model.transformer.h[1].mlp = experts
    path = "transformer.layers.1.mlp"
    for name in [name for name in tensors if name.startswith(f"{path}.")]:
        tensor = tensors.pop(name)
        if residual:
            tensors[name.replace(path, f"{path}.mlp")] = tensor
    tensors[f"{path}.deepspeed_moe.gate.wg.weight"] = experts.gate.weight.detach()
    if residual:
        tensors |= {
            f"{path}.coefficient.{kind}": getattr(experts.coefficient, kind).detach() for kind in ("weight", "bias")
        }
    save(tmp_path, tensors, 2.0, wrapper="module", topk=chosen)
    # Megatron-DeepSpeed's own layout: a state file beside a file for each expert.
    (tmp_path / "mp_rank_00" / "model_optim_rng.pt").rename(tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "mp_rank_00").rmdir()
    for i, (up, down) in enumerate(zip(experts.up, experts.down, strict=True)):
        one = {}
        for name, linear in (("dense_h_to_4h", up), ("dense_4h_to_h", down)):
            for kind in ("weight", "bias"):
                inner = f"language_model.{path}.deepspeed_moe.experts.deepspeed_experts.{i}.{name}.{kind}"
                one[inner] = getattr(linear, kind).detach()
        torch.save(one, tmp_path / f"layer_0_expert_{i}_mp_rank_00_model_states.pt")
    tokens = rng.integers(0, 96, (2, 33))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    params = dsjax.load(tmp_path)
    np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=1e-4)


def test_errors_name_the_remedy(gpt2, tmp_path):
    tensors = megatron_tensors(gpt2, 2.0)
    save(tmp_path / "swiglu", tensors, 2.0, swiglu=True)
    with pytest.raises(ConfigError, match="argument swiglu=True is not supported; only False is"):
        dsjax.load(tmp_path / "swiglu")
    save(tmp_path / "ranks", tensors, 2.0, ranks=2)
    (tmp_path / "ranks" / "mp_rank_00").rename(tmp_path / "ranks" / "mp_rank_05")
    with pytest.raises(CheckpointError, match=r"mp_rank_00 and those that follow it should be here, are: \[1, 5\]"):
        dsjax.load(tmp_path / "ranks")
    save(tmp_path / "heads", tensors, 2.0, num_attention_heads=None)
    with pytest.raises(ConfigError, match="argument num_attention_heads=None should be a positive integer"):
        dsjax.load(tmp_path / "heads")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(CheckpointError, match="tells iteration '9', which is not there"):
        dsjax.load(tmp_path)
