import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import policies
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import flatten, leaf_specs
from policies.base import write_tensors
from policies.sources import files
from policies.sources.hf_folder import HfFolder
from policies.sources.safetensors import read_header


def check_equal(params, model):
    theirs = {name: weight.to(torch.float32).numpy() for name, weight in model.state_dict().items()}
    ours = dict(write_tensors(params, policies.get(params.config.model_type)))
    tied = {"lm_head.weight"} if params.config.tie_embeddings else set()
    assert ours.keys() == theirs.keys() - tied
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 24, "dtype": torch.bfloat16}),
        ("mistral", {"dtype": torch.float16}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"shard": "40KB"}),
    ],
)
def test_leaves_are_transformers_weights(save_hf, family, fields):
    folder, model = save_hf(family, **fields)
    params = policies.load(folder, dtype="float32")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == ("shard" in fields)
    check_equal(params, model)
    assert list(flatten(params)) == list(leaf_specs(params.config))
    assert params.config == policies.load_config(folder)


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


def test_generation_config_names_the_ends(save_hf):
    folder, _ = save_hf("llama")
    edit_json(folder / "config.json", eos_token_id=2, bos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=[7, 8], bos_token_id=6)
    assert policies.load_config(folder).eos_ids == (7, 8)
    assert policies.load_config(folder).bos_id == 6
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert policies.load_config(folder).eos_ids == (2,)
    (folder / "generation_config.json").unlink()
    assert policies.load_config(folder).eos_ids == (2,)
    assert policies.load_config(folder).bos_id is None


def test_config_errors_name_the_file(save_hf):
    folder, _ = save_hf("llama")
    edit_json(folder / "config.json", qk_norm=True)
    with pytest.raises(ConfigError, match=r"config\.json: config field qk_norm=True is unknown"):
        policies.load(folder)
    edit_json(folder / "config.json", model_type="mamba")
    with pytest.raises(ConfigError, match=r"'mamba' is not supported; supported are: .*llama"):
        policies.load(folder)


def test_shapes_must_fit_the_config(save_hf):
    folder, _ = save_hf("llama")
    edit_json(folder / "config.json", intermediate_size=95)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight' has shape \[96, 64\]"):
        policies.load(folder)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_file(save_hf, left):
    folder, _ = save_hf("llama")
    path = folder / "model.safetensors"
    before = HfFolder(folder)
    before.shapes()
    path.write_bytes(path.read_bytes()[:left])
    for use in (lambda: policies.load(folder), lambda: before.read("model.norm.weight")):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: can not be read .*is truncated or damaged, fetch it again"
        ):
            use()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is missing; fetch"):
        before.read("model.norm.weight")
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can not be read"):
        before.read("model.norm.weight")


def test_damaged_header(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(header, data=b"\0" * 8):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    write({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}})
    assert read_header(path)["a"].shape == (2,)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    wrong = ({"shape": [3]}, {"dtype": []}, {"dtype": "F31"}, {"data_offsets": [8, 0]}, {"data_offsets": [0, 16]})
    for header in (b"{", [1], {"a": {}}, {"a": 3}, *({"a": entry | change} for change in wrong)):
        write(header)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: can not be read .*truncated or damaged"):
            read_header(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_checkpoint_error(tmp_path_factory, data):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file = bytearray(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(file[: data.draw(st.integers(0, len(file)))])
    try:
        read_header(path)
    except CheckpointError:
        pass


def test_unread_dtype_is_named(save_hf):
    folder, _ = save_hf("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError, match="is of dtype I32, which is not read; these are: F32, F16, BF16"):
        policies.load(folder)


def test_missing_files(save_hf, tmp_path):
    folder, _ = save_hf("llama", shard="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{shard.name}: the file is missing"):
        policies.load(folder)
    (tmp_path / "away").rename(shard)

    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first = sorted(folder.glob("*.safetensors"))[0].name
    edit_json(index, weight_map=dict.fromkeys(places, first))
    with pytest.raises(CheckpointError, match=f"promises tensor '.*' in '{first}', which lacks it"):
        policies.load(folder)
    edit_json(index, weight_map=dict.fromkeys(places, "../" + first))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        policies.load(folder)
    edit_json(index, weight_map=None)
    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        policies.load(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        policies.load(folder)
    assert policies.load_config(folder).num_layers == 2


def test_folders_that_hold_something_else(tmp_path, save_hf):
    with pytest.raises(CheckpointError, match="there is no config.json in this folder, which holds: nothing"):
        policies.load(tmp_path)
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(CheckpointError, match="give the path of one of them, such as .*model-q4.gguf"):
        policies.load(tmp_path)
    folder, _ = save_hf("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no model.safetensors, pytorch_model.bin, or an index of eith"):
        policies.load(folder)
    edit_json(folder / "config.json", model_type=None)
    with pytest.raises(ConfigError, match=r"config\.json: config field model_type is missing"):
        policies.load(folder)


def test_shards_without_an_index(save_hf):
    folder, model = save_hf("llama", shard="40KB")
    (folder / "model.safetensors.index.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    check_equal(policies.load(folder), model)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"holds {len(shards) - 1} of {len(shards)} shards .* and no index"):
        policies.load(folder)


def test_one_file_of_a_folder(save_hf):
    folder, model = save_hf("llama")
    file = (folder / "model.safetensors").rename(folder / "mine.safetensors")
    check_equal(policies.load(file), model)
    with pytest.raises(CheckpointError, match=r"has no weights by .*; give the file, such as .*mine\.safetensors$"):
        policies.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: there is no config\.json beside it"):
        policies.load(file)


def test_a_tensor_in_two_shards(save_hf):
    folder, _ = save_hf("llama", shard="40KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    with safe_open(first, "numpy") as one, safe_open(second, "numpy") as two:
        name = next(iter(one.keys()))
        save_file({name: one.get_tensor(name)} | {key: two.get_tensor(key) for key in two.keys()}, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: holds tensor '{name}', which '{first.name}' holds too"):
        policies.load(folder)


def test_an_index_that_names_itself(save_hf):
    folder, _ = save_hf("llama", shard="40KB")
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={"lm_head.weight": index.name})
    with pytest.raises(
        CheckpointError, match=r"names 'model\.safetensors\.index\.json' as a shard, which is not a \.sa"
    ):
        policies.load(folder)


def test_large_tensors_are_read_in_pieces(save_hf, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 1000)
    folder, model = save_hf("llama")
    check_equal(policies.load(folder), model)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_does_not_change_with_its_file(save_hf, dtype):
    folder, _ = save_hf("llama", dtype=getattr(torch, dtype))
    tensor = HfFolder(folder).read("model.norm.weight")
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert tensor.dtype.name == dtype
    np.testing.assert_array_equal(tensor.astype(np.float32), np.ones(64, np.float32))
