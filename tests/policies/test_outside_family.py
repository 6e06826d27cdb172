"""A family that is not in the package: the one that policies/README.md adds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dsjax
import policies

README = Path(__file__).parents[2] / "policies" / "README.md"


@pytest.fixture
def halflama():
    """What the README's code registers, for the time of a test."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(code, {})
    yield policies.get("halflama")
    del policies.registry._POLICIES["halflama"]


def test_a_family_from_outside_loads_and_writes(halflama, tmp_path, rng):
    # StableLM computes the same, with three projections.
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        partial_rotary_factor=0.5,
        attn_implementation="eager",
    )
    model = transformers.StableLmForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        parts = [tensors.pop(f"model.layers.{i}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"model.layers.{i}.self_attn.qkv.weight"] = torch.cat(parts)
    save_file(tensors, tmp_path / "model.safetensors")
    fields = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    raw = {name: getattr(config, name) for name in fields.split()}
    raw |= {"model_type": "halflama", "max_position_embeddings": 64, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    params = dsjax.load(tmp_path)
    tokens = rng.integers(0, 97, (2, 30))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=1e-4)

    written = load_file(policies.export_hf(params, tmp_path / "out") / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)
