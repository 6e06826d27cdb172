"""Damaged checkpoints of every format: a clear error or the whole tree, never anything between."""

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import policies
from dsjax.errors import CheckpointError, DsjaxError
from dsjax.params import flatten, leaf_specs
from policies.sources.torch_pickle import read_pickle

SECONDS = 20.0
BYTES = 2**27


def write(folder, form, tensors, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def attempt(model, **options):
    """Loads; the tree if that is whole, or the error if it is a clear one. Anything else fails the test."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        params = policies.load(model, **options)
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
        assert shapes == {path: spec.shape for path, spec in leaf_specs(params.config).items()}
        return params
    except DsjaxError as error:
        assert len(str(error)) > 20
        return error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < BYTES and time.monotonic() - begin < SECONDS


@pytest.fixture(scope="module")
def model():
    """Tensors and configuration of a tiny llama with one layer."""
    import transformers

    sizes = dict(vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=1, max_position_embeddings=32)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    made = transformers.LlamaForCausalLM(config)
    return made.state_dict(), json.loads(config.to_json_string(use_diff=False))


# What a description is made of gets further than random bytes.
PIECES = [
    b"0",
    b"1",
    b"9",
    b"-",
    b"99999999",
    b'"',
    b"{",
    b"[",
    b",",
    b" ",
    b"\0",
    b"\1",
    b"\x7f",
    b"\xff\xff\xff\x7f",
    b"K",
    b"q",
]
FRACTIONS = st.floats(0, 1)
CHANGES_OF_BYTES = st.one_of(
    st.tuples(FRACTIONS, st.sampled_from(PIECES)),
    st.tuples(FRACTIONS, st.binary(min_size=1, max_size=9)),
    st.tuples(FRACTIONS, FRACTIONS),  # what stands elsewhere in the description
)


@st.composite
def damages(draw):
    """Changes of bytes at fractions of the description, or where the file is cut."""
    if draw(st.integers(0, 4)) == 0:
        return [], draw(FRACTIONS)
    return draw(st.lists(CHANGES_OF_BYTES, min_size=1, max_size=2)), None


def damaged(whole, damage, begin, end):
    changes, cut = damage
    file = bytearray(whole)
    for where, new in changes:
        at = begin + int(where * (end - begin - 1))
        if isinstance(new, float):
            source = begin + int(new * (end - begin - 1))
            new = whole[source : source + 8]
        file[at : at + len(new)] = new
    return bytes(file if cut is None else file[: int(cut * len(file))])


class Whole:
    """A checkpoint, its file to damage, that file's bytes, and where among them the tensors are described."""

    def __init__(self, model, file, begin, end, data):
        self.model, self.file, self.begin, self.end, self.data = model, file, begin, end, data

    def load_damaged(self, damage):
        self.file.write_bytes(damaged(self.data, damage, self.begin, self.end))
        try:
            return attempt(self.model)
        finally:
            self.file.write_bytes(self.data)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder of each format, the file to damage, its bytes, and where its description of the tensors lies."""
    root = tmp_path_factory.mktemp("fuzz")
    tensors, config = model
    folders = {form: write(root / form, form, tensors, config) for form in ("safetensors", "torch")}
    st_bytes = (folders["safetensors"] / "model.safetensors").read_bytes()
    bin_bytes = (folders["torch"] / "pytorch_model.bin").read_bytes()
    config_bytes = (folders["safetensors"] / "config.json").read_bytes()
    shutil.copytree(folders["safetensors"], root / "config")
    config_only = root / "config"
    header = 8 + int.from_bytes(st_bytes[:8], "little")
    safetensors, pytorch = folders["safetensors"] / "model.safetensors", folders["torch"] / "pytorch_model.bin"
    return {
        "safetensors": Whole(folders["safetensors"], safetensors, 0, header, st_bytes),
        "pickle": Whole(folders["torch"], pytorch, 0, bin_bytes.index(b"data/0"), bin_bytes),
        "directory": Whole(folders["torch"], pytorch, bin_bytes.index(b"PK\1\2"), len(bin_bytes), bin_bytes),
        "config": Whole(config_only, config_only / "config.json", 0, len(config_bytes), config_bytes),
    }


@pytest.mark.parametrize("form", ["safetensors", "pickle", "directory", "config"])
@settings(max_examples=60, deadline=None)
@given(damage=damages())
def test_damaged_bytes(whole, form, damage):
    whole[form].load_damaged(damage)


@settings(max_examples=60, deadline=None)
@given(damage=damages())
def test_damaged_gguf(gguf_file, damage):
    gguf_file.load_damaged(damage)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_sliding_window, 8),
    ):
        add(value)
    names = {name: (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    names |= {"attn_k": (16, 32), "attn_v": (16, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in names.items()}
    shapes |= {"token_embd.weight": (7, 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        raw = np.zeros(shape, np.float32)
        if len(shape) == 2:
            writer.add_tensor(name, gguf.quantize(raw, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
        else:
            writer.add_tensor(name, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    assert not isinstance(attempt(path), DsjaxError)
    return Whole(path, path, 4, data.rindex(b"output_norm.weight") + 50, data)


@pytest.mark.parametrize(
    ("after", "new", "message"),
    [
        (b"llama.block_count" + struct.pack("<I", 4), struct.pack("<I", 2**32 - 1), "should have 4294967295 layers"),
        (b"llama.embedding_length" + struct.pack("<I", 4), struct.pack("<I", 33), "embedding_length=33"),
        (b"blk.0.attn_k.weight", struct.pack("<IQQIQ", 2, 32, 16, 8, 0), "overlap"),
        (b"blk.0.attn_k.weight", struct.pack("<IQQIQ", 2, 32, 16, 8, 2**20), "truncated or damaged"),
        (b"blk.0.attn_k.weight", struct.pack("<IQQ", 2, 32, 17), "has shape .17, 32.|overlap"),
    ],
)
def test_gguf_that_lies(gguf_file, after, new, message):
    data = gguf_file.data
    at = data.index(after) + len(after)
    gguf_file.file.write_bytes(data[:at] + new + data[at + len(new) :])
    with pytest.raises(DsjaxError, match=message):
        raise attempt(gguf_file.file)


@pytest.mark.parametrize("name", ["part.safetensors", "part.bin", "part.gguf", "part.pth"])
def test_a_pipe_keeps_nobody_waiting(tmp_path, model, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(model[1]))
    with pytest.raises(CheckpointError, match=f"{name}: this is not a file"):
        raise attempt(tmp_path / name)


FORMS = ["safetensors", "torch", "memory"]
UP = "model.layers.0.mlp.up_proj.weight"
CHANGES = {
    "missing": (lambda t: t.pop(UP), "needs tensor '.*up_proj.weight' of shape .24, 16., which the file lacks"),
    "extra": (lambda t: t.update(extra=torch.ones(2)), "tensor 'extra' .2. has no place"),
    "one row more": (lambda t: t.update({UP: torch.ones(25, 16)}), "has shape .25, 16., .* needs .24, 16."),
    "an axis more": (lambda t: t.update({UP: torch.ones(24, 16, 1)}), "has shape .24, 16, 1."),
    "integers": (lambda t: t.update({UP: torch.ones(24, 16, dtype=torch.int32)}), "of dtype (I32|int32), which is not"),
    "doubles": (lambda t: t.update({UP: torch.ones(24, 16, dtype=torch.float64)}), "of dtype (F64|float64), which is"),
    "nothing": (lambda t: t.clear(), "needs tensor .* more"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit(tmp_path, model, form, change):
    tensors, config = dict(model[0]), model[1]
    edit, message = CHANGES[change]
    edit(tensors)
    with pytest.raises(CheckpointError, match=message):
        if form == "memory":
            raise attempt(tensors, config=config)
        raise attempt(write(tmp_path / "m", form, tensors, config))


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts"])
def test_counts_beyond_any_model(tmp_path, model, name):
    folder = write(tmp_path / "m", "safetensors", model[0], model[1] | {name: 10**9})
    with pytest.raises(DsjaxError, match=f"{name}=1000000000 is more than any model has"):
        raise attempt(folder)


PLACES = ["part.safetensors", "..", ".", "", "/etc/passwd", "a\0.safetensors", "a/b.safetensors", "ü.safetensors"]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_config_values_of_any_kind(model, data):
    tensors, config = model
    name = data.draw(st.sampled_from(sorted(config)))
    attempt(tensors, config=config | {name: data.draw(scalars)})


@settings(max_examples=60, deadline=None)
@given(places=st.dictionaries(st.sampled_from([UP, "x"]), st.sampled_from(PLACES) | st.text(max_size=5)))
@example(places={UP: None})
@example(places=["part.safetensors"])
@example(places={UP: "/etc/passwd"})
@example(places={UP: "../m/model.safetensors"})
@example(places={UP: "config.json"})
@example(places={UP: "model.safetensors.index.json"})
def test_indexes_of_any_kind(whole, tmp_path_factory, places):
    folder = tmp_path_factory.getbasetemp() / "indexes"
    if not folder.exists():
        shutil.copytree(whole["safetensors"].model, folder)
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    error = attempt(folder)
    # The one file that there is holds every tensor, whichever of them the index names.
    assert isinstance(error, DsjaxError) or set(places.values()) == {"part.safetensors"} and "x" not in places


OPCODES = sorted({opcode.code.encode("latin-1") for opcode in pickletools.opcodes})


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=5)), max_size=40))
@example(parts=[b"\x80\x02]r\xff\xff\xff\x7f."])  # a memo of 2**31 entries
@example(parts=[b"\x80\x05\x96", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"a."])  # a bytearray of 2**63
@example(parts=[b"\x80\x04\x95", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"."])  # a frame of 2**63
@example(parts=[b"\x80\x02)" + b"\x85" * 10**5 + b"."])  # a tuple in a tuple in a tuple
@example(parts=[b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s."])  # as a key
@example(parts=[b"\x80\x02\x8b\xff\xff\xff\x7f\x01."])  # an integer of 2**31 bytes
def test_any_pickle(parts):
    try:
        read_pickle(b"".join(parts), {"a.b": lambda *arguments: arguments}, lambda identity: identity)
    except CheckpointError:
        pass


def test_pickles_of_data_are_read_as_pickle_reads_them():
    data = {"a": [1, 2.5, -(2**70), "x", None, True], "b": ((), (1,), (1, 2, 3, 4)), 3: {"c": b"bytes", "d": []}}
    data["again"] = data["a"]
    for protocol in (2, 3, 4, 5):
        buffer = io.BytesIO()
        pickle.Pickler(buffer, protocol).dump(data)
        read = read_pickle(buffer.getvalue(), {"_codecs.encode": lambda text, _: text.encode("latin-1")}, id)
        assert read == data and read["again"] is read["a"]
