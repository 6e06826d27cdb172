"""Meta's llama folders, made here from transformers' models: rows of rotary pairs side by side, cut in pieces."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import dsjax
import policies
from dsjax.config import RopeScaling
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import flatten

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def to_meta(model):
    """Tensors of a transformers llama under Meta's names, in Meta's row order."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Of each head, row j of the first half and row j of the second become neighbours.
            weight = weight.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        tensors[name] = weight
    return tensors


def cut(tensors, count, embedding_axis):
    """The pieces of each of `count` devices."""
    axes = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0) | {"wo": 1, "w2": 1}
    axes["tok_embeddings"] = embedding_axis
    pieces = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        axis = axes.get(name.split(".")[-2])
        parts = [tensor] * count if axis is None else tensor.chunk(count, axis)
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part.clone()
    return pieces


@pytest.fixture
def save_meta(save_hf, tmp_path):
    def save(count=1, embedding_axis=1, params=None, **overrides):
        hf_folder, model = save_hf("llama", vocab_size=38, **overrides)
        folder = tmp_path / "meta"
        folder.mkdir(exist_ok=True)
        tensors = to_meta(model) | {"rope.freqs": torch.ones(8)}
        for i, piece in enumerate(cut(tensors, count, embedding_axis)):
            torch.save(piece, folder / f"consolidated.{i:02d}.pth")
        values = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-6, vocab_size=-1, multiple_of=32)
        (folder / "params.json").write_text(json.dumps(values | (params or {})))
        return folder, hf_folder, model

    return save


@pytest.mark.parametrize(("count", "embedding_axis"), [(1, 0), (2, 0), (2, 1)])
def test_leaves_are_those_of_transformers(save_meta, count, embedding_axis):
    folder, hf_folder, _ = save_meta(count, embedding_axis, dtype=torch.bfloat16)
    ours, theirs = flatten(policies.load(folder)), flatten(policies.load(hf_folder))
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_logits_are_transformers(save_meta):
    folder, _, model = save_meta(2)
    tokens = torch.randint(0, 38, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    np.testing.assert_allclose(dsjax.logits(dsjax.load(folder), tokens.numpy()), expected, atol=1e-4)


def test_config(save_meta):
    folder, hf_folder, _ = save_meta()
    ours, theirs = policies.load_config(folder), policies.load_config(hf_folder)
    assert (ours.max_context, ours.bos_id, ours.eos_ids) == (2048, None, ())
    same = dict(max_context=theirs.max_context, bos_id=theirs.bos_id, eos_ids=theirs.eos_ids)
    assert dataclasses.replace(ours, **same) == theirs
    folder, *_ = save_meta(params={"rope_theta": 500000, "use_scaled_rope": True, "norm_eps": 1e-5})
    config = policies.load_config(folder)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.max_context, config.norm_eps) == (500000.0, 131072, 1e-5)
    folder, *_ = save_meta(params={"use_scaled_rope": True, "rope_scaling_factor": 32})
    assert policies.load_config(folder).rope_scaling.factor == 32.0


def test_a_tied_head(save_meta):
    folder, *_ = save_meta()
    tensors = torch.load(folder / "consolidated.00.pth")
    del tensors["output.weight"]
    torch.save(tensors, folder / "consolidated.00.pth")
    assert "head.weight" not in flatten(policies.load(folder))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"moe_args": {"num_experts": 16}}, r"params\.json: moe_args=.* is unknown and may change"),
        ({"n_layers": None}, r"params\.json: n_layers=None should be a positive int"),
        ({"n_heads": 5}, "n_heads=5 does not divide dim=64"),
        ({"norm_eps": "1"}, "norm_eps='1' should be a positive float"),
        ({"n_layers": 3}, r"'layers\.2\.attention_norm\.scale' needs tensor 'layers\.2\.attention_norm\.weight'"),
    ],
)
def test_params_that_do_not_fit(save_meta, params, message):
    folder, *_ = save_meta(params=params)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        policies.load(folder)


def test_pieces_that_do_not_fit(save_meta):
    folder, *_ = save_meta(2)
    second = folder / "consolidated.01.pth"
    whole = torch.load(second)
    torch.save({name: tensor for name, tensor in whole.items() if name != "norm.weight"}, second)
    with pytest.raises(CheckpointError, match="pieces of the same tensors, but only one has 'norm.weight'"):
        policies.load(folder)
    torch.save(whole | {"layers.0.attention.wo.weight": torch.zeros(64, 31)}, second)
    with pytest.raises(CheckpointError, match=r"pieces of tensor 'layers\.0\.attention\.wo\.weight' differ in shape"):
        policies.load(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'output\.weight' has shape \[19, 64\]|tensor .* has shape"):
        policies.load(folder)
    torch.save(whole, folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"should be here, are: consolidated\.00\.pth, consolidated\.02\.pth"):
        policies.load(folder)
