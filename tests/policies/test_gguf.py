import struct

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import policies
from dsjax.config import RopeScaling
from dsjax.errors import CheckpointError, ConfigError, DsjaxError
from dsjax.params import flatten, leaf_specs
from dsjax.quantization import QuantizedArray
from dsjax.tokenizer import load_tokenizer
from policies.base import write_tensors
from policies.sources import gguf as source
from policies.sources.gguf import GgufFile

BLOCKS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]


def by_tensor_name(params, weights):
    """Leaves under their tensors' names, in the file's row order."""
    leaves = flatten(params)
    tensors = {}
    for step in weights.steps(params.config):
        if step.leaves[0] in leaves:
            tensors[step.tensors[0]] = step.op.to_tensors([leaves[step.leaves[0]]], params.config)[0]
    return tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_kept_as_they_are(write_gguf, gguf_parts, monkeypatch, architecture, kind):
    monkeypatch.setattr(source, "_PIECE", 7)
    tensors, metadata = gguf_parts(architecture, kind, bias=architecture == "qwen2")
    path = write_gguf(tensors, metadata, architecture)
    params = policies.load(path)
    ours = by_tensor_name(params, GgufFile(path).weights)
    assert ours.keys() == tensors.keys() and len(flatten(params)) == len(tensors)
    for name, stored in tensors.items():
        leaf = ours[name]
        if not isinstance(stored, tuple):
            np.testing.assert_array_equal(leaf, stored)
            continue
        raw = stored[0]
        assert isinstance(leaf, QuantizedArray) and leaf.scheme.name == kind.name.lower() and leaf.dtype == np.float32
        # Put together again, the leaf's parts are the file's bytes.
        count = leaf.scales.size
        parts = [leaf.scales, leaf.minimums, leaf.values]
        pieces = [np.ascontiguousarray(part).view(np.uint8).reshape(count, -1) for part in parts if part is not None]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1).reshape(raw.shape), raw, err_msg=name)
        np.testing.assert_allclose(leaf.dequantize(), gguf.dequantize(raw, kind), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_types(write_gguf, gguf_parts, kind):
    tensors, metadata = gguf_parts(kind=kind)
    path = write_gguf(tensors, metadata)
    ours = by_tensor_name(policies.load(path), GgufFile(path).weights)
    for name, stored in tensors.items():
        expected = gguf.dequantize(*stored) if isinstance(stored, tuple) else stored
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_dequantized(write_gguf, gguf_parts, kind):
    # The gguf package does not write K-quants: random blocks, with float16 scales that are not huge or NaN.
    tensors, metadata = gguf_parts(hidden=256, ffn=256)
    draw = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    where = size - 2 if kind == Kind.Q6_K else 0
    for name, stored in tensors.items():
        if isinstance(stored, tuple):
            blocks = draw.integers(0, 256, (stored[0].shape[0], size), np.uint8)
            blocks[:, where : where + 2] = np.float16(draw.uniform(0, 1, len(blocks)))[:, None].view(np.uint8)
            if kind != Kind.Q6_K:
                blocks[:, 2:4] = np.float16(draw.uniform(0, 1, len(blocks)))[:, None].view(np.uint8)
            tensors[name] = blocks, kind
    path = write_gguf(tensors, metadata)
    params = policies.load(path)
    assert not any(isinstance(leaf, QuantizedArray) for leaf in flatten(params).values())
    ours = by_tensor_name(params, GgufFile(path).weights)
    for name, stored in tensors.items():
        expected = gguf.dequantize(*stored) if isinstance(stored, tuple) else stored
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


@pytest.mark.parametrize("kind", [*BLOCKS, Kind.F16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_leaves_are_what_transformers_reads(write_gguf, gguf_parts, architecture, kind):
    tensors, metadata = gguf_parts(architecture, kind, bias=architecture == "qwen2")
    metadata[f"{architecture}.vocab_size"] = 37
    path = write_gguf(tensors, metadata, architecture)
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    params = policies.load(path, quantize="none")
    ours = dict(write_tensors(params, policies.get(architecture)))
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight.float().numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
    assert params.config.rope_theta == config.rope_parameters["rope_theta"] == 5000.0


def test_config(write_gguf, gguf_parts):
    tensors, metadata = gguf_parts(tied=True)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 5}
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in ids.items()}
    config = policies.load_config(write_gguf(tensors, metadata))
    assert (config.model_type, config.vocab_size, config.hidden_size, config.head_dim) == ("llama", 37, 64, 16)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.intermediate_size) == (2, 4, 2, 96)
    assert (config.max_context, config.rope_theta, config.norm_eps) == (128, 5000.0, pytest.approx(1e-5))
    assert config.tie_embeddings and not config.attention_bias and config.windows == () and config.rope_scaling is None
    assert (config.bos_id, config.eos_ids) == (1, (2, 5))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention.sliding_window": 9}, {"model_type": "mistral", "windows": (9, 9)}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope.scaling.factor": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope.scale_linear": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"rope.scaling.factor": 1.0}, {"rope_scaling": None}),
        ({"attention.head_count_kv": None}, {"num_kv_heads": 4}),
        ({"rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"expert_count": 0, "attention.causal": True, "rope.dimension_count": 16}, {}),
        ({"attention.key_length": 10, "attention.value_length": 10, "rope.dimension_count": 10}, {"head_dim": 10}),
    ],
)
def test_config_variants(write_gguf, gguf_parts, changes, expected):
    tensors, metadata = gguf_parts()
    metadata |= {f"llama.{key}": value for key, value in changes.items()}
    config = policies.load_config(write_gguf(tensors, {k: v for k, v in metadata.items() if v is not None}))
    for name, value in expected.items():
        assert getattr(config, name) == value


def test_rope_factors(write_gguf, gguf_parts):
    tensors, metadata = gguf_parts()
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    params = policies.load(write_gguf(tensors, metadata))
    assert params.config.rope_scaling == RopeScaling("factors", factors=tuple(range(1, 9)))
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    assert policies.load_config(write_gguf(tensors, metadata)).rope_scaling is None
    with pytest.raises(ConfigError, match=r"rope\.scaling\.factor=2\.0 and 'rope_freqs\.weight' are both given"):
        policies.load_config(write_gguf(tensors, metadata | {"llama.rope.scaling.factor": 2.0}))
    tensors["rope_freqs.weight"] = np.ones(7, np.float32)
    with pytest.raises(CheckpointError, match=r"'rope_freqs\.weight' has shape \[7\]"):
        policies.load_config(write_gguf(tensors, metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type=yarn is not supported"),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count is missing"),
        ({"llama.logit_scale": 2.0}, r"llama\.logit_scale=2\.0"),
        ({"llama.rope.scaling.attn_factor": 0.5}, r"llama\.rope\.scaling\.attn_factor=0\.5"),
        ({"split.count": 3}, "one of 3 parts; join them with llama.cpp's `llama-gguf-split --merge`"),
        ({"llama.attention.causal": False}, r"llama\.attention\.causal=False"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count=8 is not supported; only the head size 16"),
        ({"llama.attention.value_length": 8}, r"llama\.attention\.value_length=8"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.block_count": "2"}, r"llama\.block_count is '2'; only one int is read"),
        ({"llama.feed_forward_length": [96, 48]}, r"llama\.feed_forward_length is a list of 2"),
        ({"llama.attention.head_count": 5}, "5 heads do not divide embedding_length=64"),
        ({"llama.embedding_length": 65}, r"llama\.embedding_length=65"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "special token's id in the metadata is '2'"),
    ],
)
def test_unsupported_metadata_is_named(write_gguf, gguf_parts, changes, message):
    tensors, metadata = gguf_parts()
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    with pytest.raises(DsjaxError, match=message):
        policies.load(write_gguf(tensors, metadata))


def test_unknown_architecture(write_gguf, gguf_parts):
    tensors, metadata = gguf_parts()
    path = write_gguf(tensors, metadata, architecture="mamba")
    with pytest.raises(ConfigError, match="'mamba' is not supported; supported are: llama, qwen2, qwen3"):
        policies.load(path)


def test_unread_type_is_named(write_gguf, gguf_parts):
    tensors, metadata = gguf_parts()
    shape = gguf.quant_shape_to_byte_shape((64, 64), Kind.Q5_0)
    tensors["blk.1.attn_q.weight"] = np.zeros(shape, np.uint8), Kind.Q5_0
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_q\.weight' is of type Q5_0, which is not read.*Q4_1"):
        policies.load(write_gguf(tensors, metadata))


def test_tensors_must_fit(write_gguf, gguf_parts):
    tensors, metadata = gguf_parts()
    missing = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"'layers\.1\.mlp\.up\.weight' needs tensor 'blk\.1\.ffn_up\.weight'"):
        policies.load(write_gguf(missing, metadata))
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.0\.ffn_gate_inp\.weight' \[4\] has no place"):
        policies.load(write_gguf(tensors | {"blk.0.ffn_gate_inp.weight": np.zeros(4, np.float32)}, metadata))
    del tensors["token_embd.weight"]
    with pytest.raises(CheckpointError, match="embedding 'token_embd.weight' is missing"):
        policies.load(write_gguf(tensors, metadata))


def test_files_that_are_not_whole(write_gguf, gguf_parts):
    path = write_gguf(*gguf_parts())
    whole = path.read_bytes()
    for size in (4, 20, 300, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=rf"model\.gguf: the file should have at least \d+ bytes, has {size}; it is truncated"
        ):
            policies.load(path)
    for wrong in (b"", b"\x80\x02}q", b"ggml" + whole[4:]):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"model\.gguf: this is not a GGUF file"):
            policies.load(path)


def test_a_file_cut_after_its_header_was_read(write_gguf, gguf_parts):
    path = write_gguf(*gguf_parts(kind=Kind.Q8_0))
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[: file.tensors["blk.1.ffn_up.weight"].offset + 40])
    for name in ("blk.1.ffn_up.weight", "blk.1.ffn_down.weight"):
        with pytest.raises(CheckpointError, match=r"model\.gguf: .*truncated or damaged, fetch it again"):
            file.read(name)


NAME = b"blk.0.attn_q.weight"  # then come the number of axes, two axes, the type, and the offset


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (b"GGUF", b"GGUF" + struct.pack("<I", 4), "version 4 which we cannot handle"),
        (b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "it is truncated or damaged"),
        (b"llama.block_count", b"\xff", "invalid start byte"),
        (b"llama.block_count", b"llama.block_count" + struct.pack("<I", 77), r"77\)? is not a valid GGUFValueType"),
        (NAME, b"blk.1", r"duplicated tensor with name blk\.1\.attn_q\.weight"),
        (NAME, NAME + struct.pack("<IQQI", 2, 64, 64, 99), r"99\)? is not a valid GGMLQuantizationType"),
        (NAME, NAME + struct.pack("<IQQI", 2, 48, 64, Kind.Q4_1), "not a multiple of Q4_1 block size"),
        (NAME, NAME + struct.pack("<IQQ", 2, 2**33, 2**33), "cannot reshape array"),
        (NAME, NAME + struct.pack("<IQQ", 2, 2**40, 64), "should have at least .* it is truncated or damaged"),
        (NAME, NAME + struct.pack("<IQQIQ", 2, 64, 64, Kind.F32, 2**64 - 32), "overflow"),
    ],
)
def test_damaged_headers(write_gguf, gguf_parts, at, new, message):
    path = write_gguf(*gguf_parts())
    whole = path.read_bytes()
    assert whole.count(at) == 1
    begin = whole.index(at)
    path.write_bytes(whole[:begin] + new + whole[begin + len(new) :])
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}.*fetch it again"):
        policies.load(path)


def test_arrays_in_arrays_have_an_end(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9000
    )
    with pytest.raises(CheckpointError, match="the header can not be read .*recursion"):
        policies.load(path)


def write_small(path, **options):
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_big_endian_file(tmp_path):
    write_small(tmp_path / "model.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"model\.gguf: this is a big-endian file; only little-endian ones are"):
        policies.load(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    write_small(path)
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_clear_error(small_file, data):
    path, whole = small_file
    file = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(file[: data.draw(st.integers(0, len(file)))])
    source._read_header.cache_clear()  # examples come faster than a file system's clock ticks
    try:
        policies.load_config(path)
    except DsjaxError:
        pass


def test_header_is_what_was_written(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {"uint8": 200, "int8": -3, "uint16": 65535, "int16": -9, "uint32": 2**31, "int32": -70000, "bool": True}
    values |= {"uint64": 2**63, "int64": -(2**62), "float32": 0.5, "float64": 0.1, "string": "\u00e9\u2581"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    arrays = {"strings": ["\u00e9", "", "\u2581a b\n"], "bools": [True, False], "floats": [0.25, -1.5], "ints": [3, -4]}
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.add_custom_alignment(64)
    kinds = {f"t{i}": kind for i, kind in enumerate([Kind.F32, Kind.Q8_0, Kind.BF16, Kind.Q4_1])}
    tensors = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        tensors[name] = gguf.quantize(np.random.default_rng(seed).standard_normal((3, 64), np.float32), kind)
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, whole = GgufFile(path), path.read_bytes()
    assert file.metadata == {"general.architecture": "llama", "general.alignment": 64} | values | arrays
    assert list(file.tensors) == list(kinds) and file.shapes() == dict.fromkeys(kinds, (3, 64))
    for name, info in file.tensors.items():
        assert info.kind == kinds[name]
        assert whole[info.offset : info.offset + info.nbytes] == tensors[name].tobytes()


def test_a_header_is_read_once(write_gguf, gguf_parts, monkeypatch):
    read = []

    class Reader(source._Reader):
        def __init__(self, path):
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(source, "_Reader", Reader)
    tensors, metadata = gguf_parts()
    vocabulary = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    path = write_gguf(tensors, metadata)
    for _ in range(2):
        assert policies.load(path).config == policies.load_config(path)
        assert load_tokenizer(path).encode("ab") == [2]
    assert read == [path]
    path = write_gguf(tensors, metadata | {"tokenizer.ggml.tokens": ["b", "a", "ab", "c"]})
    assert load_tokenizer(path).vocab_size == 4
    assert read == [path, path]


def test_smollm2(smollm2_path):
    params = policies.load(smollm2_path)
    assert params.config.num_layers == 30 and params.config.tie_embeddings and params.config.eos_ids == (2,)
    specs, leaves = leaf_specs(params.config), flatten(params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: spec.shape for path, spec in specs.items()}
    schemes = [leaf.scheme.name for leaf in leaves.values() if isinstance(leaf, QuantizedArray)]
    assert schemes.count("q4_1") == 210 and schemes.count("q8_0") == 1
    # The file is 98.4 MB; what is not weights is the vocabulary.
    assert sum(part.nbytes for part in jax.tree.leaves(params)) == 96_576_768
