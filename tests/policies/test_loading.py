import os
import subprocess
import sys
import textwrap

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import policies
from dsjax import checkpoint
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import Params, flatten, leaf_specs
from dsjax.quantization import QuantizedArray
from dsjax.sharding import named_sharding
from policies import loading
from policies.sources.files import FileTensor
from policies.sources.hf_folder import HfFolder


@pytest.mark.parametrize("dtype", [None, "bfloat16", jnp.float16, np.dtype("float32")])
def test_dtype_of_plain_leaves(save_hf, dtype):
    folder, _ = save_hf("llama")
    params = policies.load(str(folder), dtype=dtype)
    assert isinstance(params, Params)
    expected = jnp.dtype(dtype or "float32")
    whole = flatten(policies.load(folder))
    for path, leaf in flatten(params).items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == expected
        np.testing.assert_array_equal(leaf, whole[path].astype(expected))


def test_default_dtype_of_an_accelerator(save_hf, monkeypatch):
    folder, _ = save_hf("llama")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in flatten(policies.load(folder)).values())


def test_quantize(write_gguf, gguf_parts):
    path = write_gguf(*gguf_parts(kind=gguf.GGMLQuantizationType.Q4_1, tied=True))
    kept = flatten(policies.load(path, dtype="bfloat16"))
    plain = flatten(policies.load(path, dtype="bfloat16", quantize="none"))
    assert sum(isinstance(leaf, QuantizedArray) for leaf in kept.values()) == 15
    for name, leaf in plain.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == kept[name].dtype == jnp.bfloat16
        expected = kept[name].dequantize() if isinstance(kept[name], QuantizedArray) else kept[name]
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize='int3' is not supported; None .* 'none' .* and 'q4_0', .*'int4', .* are"),
        ({"dtype": "int8"}, "dtype=int8 is not supported; supported are: float32, bfloat16, float16"),
        ({"dtype": "float99"}, "dtype='float99' is not a dtype"),
    ],
)
def test_wrong_options_come_before_any_file(options, message):
    with pytest.raises(ConfigError, match=message):
        policies.load("no/such-model", **options)


def test_mesh_spreads_leaves(write_gguf, gguf_parts):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    path = write_gguf(*gguf_parts(kind=gguf.GGMLQuantizationType.Q4_0))
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    params = policies.load(path)
    alone, spread = flatten(params), flatten(policies.load(path, mesh=mesh))
    plain = flatten(policies.load(path, mesh=mesh, quantize="none"))
    queries = spread["layers.0.attention.q.weight"]
    assert {shard.data.shape for shard in queries.values.addressable_shards} == {(32, 32)}
    assert {shard.data.shape for shard in queries.scales.addressable_shards} == {(32, 2)}
    whole = plain["layers.0.attention.q.weight"]
    assert {shard.data.shape for shard in whole.addressable_shards} == {(32, 64)}
    assert spread["final_norm.scale"].sharding.is_fully_replicated
    for name, leaf in alone.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, spread[name])
        expected = named_sharding(mesh, leaf_specs(params.config)[name].axes, plain[name].shape)
        assert plain[name].sharding.is_equivalent_to(expected, plain[name].ndim), name
        np.testing.assert_array_equal(plain[name], leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf)


def test_a_missing_file():
    with pytest.raises(CheckpointError, match="'missing.gguf': no such file or folder"):
        policies.load("missing.gguf")


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_no_file_stays_mapped(save_hf, write_gguf, gguf_parts, form):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the maps as Linux lists them")
    path = write_gguf(*gguf_parts()) if form == "gguf" else save_hf("llama")[0]
    policies.load(path)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()


MEASURE = r"""
import re, sys
import jax
import policies
from dsjax import checkpoint

def peak():  # not getrusage's, which a process inherits from the one that starts it
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

small, large, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
policies.load(small, **options)  # the runtime's own memory, and every program but for its shapes
before = peak()
params = policies.load(large, **options)
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.parametrize("case", ["safetensors", "cast", "quantized on the way", "int4", "quantized", "dequantized"])
def test_peak_memory_is_the_tree_and_a_few_tensors(save_hf, write_gguf, gguf_parts, case):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak as Linux counts it")
    if case in ("safetensors", "cast", "quantized on the way", "int4"):
        sizes = dict(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2)
        small, _ = save_hf("llama", folder="small")
        large, _ = save_hf("llama", folder="large", shard="60MB", **sizes)
        assert len(list(large.glob("*.safetensors"))) > 2
        # In float32: 62.5 MiB of embedding, and as much of head.
        schemes = {"quantized on the way": "q8_0", "int4": "int4"}
        options = {"dtype": "bfloat16"} if case == "cast" else {"quantize": schemes.get(case)}
        largest = 16000 * 1024 * 4
    else:
        small = write_gguf(*gguf_parts(kind=gguf.GGMLQuantizationType.Q8_0), name="small.gguf")
        large = write_gguf(*gguf_parts(kind=gguf.GGMLQuantizationType.Q8_0, hidden=2048, ffn=6144), name="large.gguf")
        plain = case == "dequantized"
        options, largest = {"quantize": "none"} if plain else {}, 2048 * 6144 * (4 if plain else 34 / 32)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(large), repr(options)],
        capture_output=True,
        text=True,
        check=True,
        # What the loader holds, and not what malloc keeps of it: blocks of a megabyte go back when they are freed.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    grown, tree = map(int, done.stdout.split())
    assert grown > 0.8 * tree, "the measurement saw no tree"
    # Rounding on the device, and not as they are read, takes a third.
    assert grown <= tree + (3 if case == "int4" else 2) * largest, (
        f"{grown / 2**20:.0f} MiB for a tree of {tree / 2**20:.0f}"
    )


def test_progress(save_hf, capsys, monkeypatch):
    folder, _ = save_hf("llama")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(policies.load(folder)))
    capsys.readouterr()
    policies.load(folder, progress=True)
    shown = capsys.readouterr().err
    assert "loading" in shown and "B/s" in shown and f"{size / 1000:.0f}k" in shown
    for watched in (False, True):  # by itself only where somebody looks, and not before two seconds
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        policies.load(folder)
        policies.load(folder, progress=False)
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(loading, "_SECONDS", 0.0)
    policies.load(folder)
    assert "B/s" in capsys.readouterr().err


class Counted:
    """A checkpoint that records how many bytes are read and not yet handed over."""

    def __init__(self, folder, fail=""):
        self.inner, self.fail, self.reads = HfFolder(folder), fail, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, name):
        if name == self.fail:
            raise CheckpointError(f"{name} is damaged")
        self.reads.append(name)
        return self.inner.read(name)


def test_what_is_read_ahead_is_bounded(save_hf, monkeypatch):
    folder, _ = save_hf("llama", num_hidden_layers=6)
    source, ahead, placed = Counted(folder), [], []
    monkeypatch.setattr(loading, "open_checkpoint", lambda *_: source)
    place = loading._place

    def watched(leaf, *rest):
        held = sum(source.stored(name)[1] for name in list(source.reads)) - sum(placed)
        ahead.append(held)
        placed.append(leaf.nbytes)
        return place(leaf, *rest)

    monkeypatch.setattr(loading, "_place", watched)
    policies.load(folder)
    largest = max(source.stored(name)[1] for name in source.reads)
    assert len(source.reads) == 57 and max(ahead) <= 2 * largest


def test_an_error_while_reading_ends_the_load(save_hf, monkeypatch):
    folder, _ = save_hf("llama", num_hidden_layers=6)
    source = Counted(folder, fail="model.layers.1.mlp.up_proj.weight")
    monkeypatch.setattr(loading, "open_checkpoint", lambda *_: source)
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight is damaged"):
        policies.load(folder)
    in_file = list(source.shapes())
    assert len(in_file) == 57
    assert len(source.reads) <= in_file.index(source.fail) + 2 * loading._READERS < 50


def test_aligned_leaves_are_not_copied_on_a_cpu(save_hf, monkeypatch):
    folder, _ = save_hf("llama")
    pointers = []
    read = FileTensor.read

    def recorded(self, out=None):
        array = read(self, out)
        pointers.append(array.ctypes.data)
        return array

    monkeypatch.setattr(FileTensor, "read", recorded)
    leaves = flatten(policies.load(folder))
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves.values()} == set(pointers)


def test_a_saved_folder(write_gguf, gguf_parts, tmp_path):
    kept = policies.load(write_gguf(*gguf_parts(kind=gguf.GGMLQuantizationType.Q4_0)), dtype="bfloat16")
    checkpoint.save(kept, tmp_path / "saved")
    again = policies.load(tmp_path / "saved")
    assert policies.load_config(tmp_path / "saved") == again.config == kept.config
    plain = flatten(policies.load(tmp_path / "saved", quantize="none"))
    for path, leaf in flatten(kept).items():
        jax.tree.map(np.testing.assert_array_equal, flatten(again)[path], leaf)
        expected = leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf
        assert plain[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(plain[path], expected)
    with pytest.raises(ConfigError, match="quantize='q8_0': .*saved by dsjax.save and is loaded as it is"):
        policies.load(tmp_path / "saved", quantize="q8_0")
