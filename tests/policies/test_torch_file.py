"""Files that torch writes: what comes out of them, and that nothing in them ever runs."""

import argparse
import builtins
import collections
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import policies
from dsjax.errors import CheckpointError
from dsjax.params import flatten
from policies.sources.files import FileTensor
from policies.sources.torch_file import TorchFile
from policies.sources.torch_pickle import read_pickle


def saved(tmp_path, state, **options):
    torch.save(state, tmp_path / "x.pt", **options)
    return tmp_path / "x.pt"


def check(tensors, state):
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        ours = tensors[name].read()
        assert ours.shape == tuple(tensor.shape) and str(tensor.dtype) == f"torch.{ours.dtype}"
        np.testing.assert_array_equal(ours.astype(np.float32), tensor.detach().float().numpy(), err_msg=name)


def test_views_and_shared_storages(tmp_path):
    base = torch.randn(6, 8)
    state = {
        "whole": base,
        "transposed": base.t(),
        "rows": base[2:5],
        "columns": base[:, 3:7],
        "steps": base[::2, ::3],
        "parameter": torch.nn.Parameter(base[1]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "one": base[:, :1][3:4],
        "half": base.half(),
        "bfloat": base.bfloat16().t(),
    }
    tensors = TorchFile(saved(tmp_path, state)).tensors()
    check(tensors, state)
    assert tensors["rows"].strides is None and tensors["transposed"].strides == (1, 8)
    assert tensors["rows"].offset == tensors["whole"].offset + 2 * 8 * 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_states(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = {
        "model": module.state_dict(),
        "args": argparse.Namespace(layers=2, params_dtype=torch.bfloat16, sizes=[1, (2, 3.5)], name=None),
        "iteration": 2**40,
        "ordered": collections.OrderedDict(a=torch.ones(2), b=torch.Size([4])),
    }
    file = TorchFile(saved(tmp_path, state, pickle_protocol=protocol))
    args = file.state["args"]
    assert vars(args) == {"layers": 2, "params_dtype": "bfloat16", "sizes": [1, (2, 3.5)], "name": None}
    assert file.state["iteration"] == 2**40 and file.state["ordered"]["b"] == (4,)
    assert isinstance(file.state["model"]["0.weight"], FileTensor)
    check(file.tensors(), {f"model.{k}": v for k, v in module.state_dict().items()} | {"ordered.a": torch.ones(2)})


@pytest.mark.parametrize("shards", [1, 3])
def test_folders(save_hf, shards):
    folder, model = save_hf("llama", dtype=torch.bfloat16)
    expected = policies.load(folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % shards + 1:05d}-of-00003.bin" for i, name in enumerate(state)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in places if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    params = policies.load(folder)
    assert params.config == expected.config
    for ours, theirs in zip(*map(_leaves, (params, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if shards == 1:
        alone = (folder / "pytorch_model.bin").rename(folder / "mine.pth")
        np.testing.assert_array_equal(_leaves(policies.load(alone))[0], _leaves(expected)[0])


def _leaves(params):
    return list(flatten(params).values())


def test_torch_is_not_imported(save_hf):
    folder, model = save_hf("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    program = "import sys, policies; policies.load(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Run:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (builtins.eval, r"(builtins|__builtin__)\.eval"),
        (builtins.getattr, r"(builtins|__builtin__)\.getattr"),
        (subprocess.check_output, r"(subprocess|commands)\.check_output"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
def test_code_is_named_and_not_run(tmp_path, function, name, protocol):
    witness = tmp_path / "witness"
    state = {"a": torch.ones(2), "b": [Run(function, f"open({str(witness)!r}, 'w')")]}
    path = saved(tmp_path, state, pickle_protocol=protocol) if protocol >= 2 else None
    with pytest.raises(CheckpointError, match=rf"asks for {name}, which weights do not need and which is never run"):
        if path is None:
            read_pickle(pickle.dumps(state["b"], protocol), {}, lambda _: None)
        else:
            TorchFile(path)
    assert not witness.exists()


def test_instructions_that_weights_do_not_use():
    for data in (
        b"\x80\x02(K\x01ios\nsystem\n.",
        b"\x80\x02(coops\nsystem\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x97.",
    ):
        with pytest.raises(
            CheckpointError, match="(uses the instruction (INST|EXT1|NEXT_BUFFER))|asks for oops.system"
        ):
            read_pickle(data, {}, lambda _: None)


def test_other_formats(tmp_path):
    state = {"a": torch.ones(2)}
    path = saved(tmp_path, state, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x\.pt: this is not a file of torch 1\.6 or later"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CheckpointError, match=r"holds no data\.pkl"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="the file is missing"):
        TorchFile(tmp_path / "missing.pt")


def rewritten(path, change):
    """The same archive with a changed pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # Sizes, strides, offset and storage as torch wrote them, and as no storage holds them.
        (b"K\x03K\x05\x86", b"K\x03K\x06\x86", r"a tensor of shape \[3, 6\] does not fit into its storage"),
        (b"K\x00K\x03K\x05\x86", b"K\x01K\x03K\x05\x86", r"a tensor of shape \[3, 5\] does not fit into its storage"),
        (b"K\x05K\x01\x86", b"K\x06K\x01\x86", r"a tensor of shape \[3, 5\] does not fit into its storage"),
        (b"K\x03K\x05\x86", b"J\xff\xff\xff\x7fK\x05\x86", "does not fit into its storage"),
        (b"K\x03K\x05\x86", b"J\xff\xff\xff\xffK\x05\x86", "a tensor is described wrongly"),
        (b"K\x0ftq", b"J\xff\xff\xff\x7ftq", "storage '0' should have 8589934588 bytes, has 60"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007", "data/7"),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, old, new, message):
    path = saved(tmp_path, {"weight": torch.randn(3, 5)})

    def change(data):
        assert data.count(old) == 1
        return data.replace(old, new)

    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{message}"):
        TorchFile(rewritten(path, change))


def test_a_few_bytes_for_a_tensor_of_any_size(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(1).expand(2**40)})
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[1099511627776\] does not fit into its storage"):
        TorchFile(path)


def test_states_without_an_end(tmp_path):
    endless = {}
    endless["again"] = endless
    wide = {}
    for _ in range(64):
        wide = {"a": wide, "b": wide}
    for state in (endless, wide):
        with pytest.raises(CheckpointError, match="has no end"):
            TorchFile(saved(tmp_path, state)).tensors()


def test_a_compressed_archive(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="is compressed"):
        TorchFile(path)
