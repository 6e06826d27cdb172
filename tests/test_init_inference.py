"""DeepSpeed's options: each has a meaning, is warned of, or is refused. The engine only records what it is given."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import dsjax
import dsjax.engine
import policies
from dsjax import memory, testing
from dsjax.deepspeed import default_inference_config, init_inference
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import flatten

# What DeepSpeed 0.19 has where nothing is given, as its two configuration classes and their parts say.
DEEPSPEEDS_DEFAULTS = {
    "replace_with_kernel_inject": True,  # False there; kernels are what one comes here for
    "tensor_parallel": {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None, "tp_group": None},
    "enable_cuda_graph": False,
    "use_triton": False,
    "triton_autotune": False,
    "zero": {},
    "triangular_masking": True,
    "moe": {
        "enabled": True,
        "ep_size": 1,
        "moe_experts": [1],
        "type": "standard",
        "ep_mp_group": None,
        "ep_group": None,
    },
    "keep_module_on_host": False,
    "quant": {
        "activation": {"enabled": True, "num_bits": 8, "q_type": "symmetric", "q_groups": 1},
        "qkv": {"enabled": True},
    },
    "checkpoint": None,
    "base_dir": "",
    "set_empty_params": False,
    "save_mp_checkpoint_path": None,
    "checkpoint_config": {"checkpoint_dir": None, "save_mp_checkpoint_path": None, "base_dir": ""},
    "return_tuple": True,
    "training_mp_size": 1,
    "replace_method": "auto",
    "injection_policy": None,
    "injection_policy_tuple": None,
    "config": None,
    "min_out_tokens": 1,
    "transposed_mode": False,
    "state_manager": {"offload": False},
    "quantization": {"quantization_mode": None},
}


SYMMETRIC = {"num_bits": 4, "group_size": 32, "symmetric": True}


def post_init(groups):
    return {"quant": {"weight": {"post_init_quant": groups}}}


class Recorder:
    """Stands for the engine."""

    pages, page_size = 10, 16

    def __init__(self, params, tokenizer=None, **arguments):
        self.params, self.tokenizer, self.arguments, self.released = params, tokenizer, arguments, False
        self.sizes = self
        Recorder.last = self

    def release(self):
        self.released = True


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(dsjax.engine, "Engine", Recorder, raising=False)


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params()


@pytest.fixture(scope="module")
def module():
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    """A Hugging Face folder with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    module.save_pretrained(path)
    testing.tiny_tokenizer().backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def loaded(monkeypatch, params):
    """Paths of what `load` was asked for."""
    paths = []
    monkeypatch.setattr(policies, "load", lambda path, **_: paths.append(path) or params)
    return paths


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_go_to_the_engine_as_they_are(params):
    engine = init_inference(params)
    assert engine.params is params
    assert (engine.tokenizer, engine.arguments) == (None, {})


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"max_out_tokens": 100}, {"max_context": 100}),
        ({"max_tokens": 100, "min_tokens": 100}, {"max_context": 100}),
        ({"replace_with_kernel_inject": False}, {"implementation": "xla"}),
        ({"kernel_inject": True}, {}),
        ({"use_triton": True}, {"implementation": "triton"}),
        ({"tensor_parallel": {"enabled": False, "tp_size": 2}}, {}),
        ({"manager": {"max_context": 64, "max_ragged_batch_size": 48}}, {"max_context": 64, "token_budget": 48}),
        ({"state_manager": {"max_tracked_sequences": 7}}, {"slots": 7}),
        ({"state_manager": {"max_tracked_sequences": 7, "max_ragged_sequence_count": 5}}, {"slots": 5}),
        (
            {"state_manager": {"max_tracked_sequences": 2048, "max_ragged_batch_size": 768}},
            {"slots": 768, "token_budget": 768},
        ),
        ({"state_manager": {"memory_config": {"mode": "allocate", "size": 12}}}, {"pages": 12}),
        ({"moe": False, "quant": None, "dtype": None}, {}),
        ({"max_out_tokens": 64, "max_tokens": None}, {"max_context": 64}),
    ],
)
def test_options_become_arguments_of_the_engine(params, options, expected):
    assert init_inference(params, options).arguments == expected
    assert init_inference(params, **options).arguments == expected


def test_reserved_bytes_become_a_fraction_of_the_memory(params, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: ("a GPU", 80_000_000_000))
    manager = {"memory_config": {"mode": "reserve", "size": 2e9}}
    assert init_inference(params, state_manager=manager).arguments == {"memory_fraction": 0.975}
    with pytest.raises(ConfigError, match=r"size=80000000000: .* a GPU has 80000000000"):
        init_inference(params, state_manager={"memory_config": {"size": 80_000_000_000}})


def test_tensor_parallel_is_a_mesh(folder):
    for options in ({"tp": {"tp_size": 2}}, {"mp_size": 2}):
        engine = init_inference(folder, options)
        mesh = engine.arguments["mesh"]
        assert dict(mesh.shape) == {"tensor": 2}
        assert list(mesh.devices) == jax.devices()[:2]
        assert engine.params["head"]["weight"].sharding.shard_shape((320, 32)) == (160, 32)
    with pytest.raises(ConfigError, match=r"tp_size=64: JAX has 2 devices \(cpu\)"):
        init_inference(folder, tensor_parallel={"tp_size": 64})


def test_the_default_config_asks_for_nothing(params):
    config = default_inference_config()
    assert config == json.loads(json.dumps(config))
    assert init_inference(params, config).arguments == {}
    config["tensor_parallel"]["tp_size"] = config["quant"]["weight"]["num_bits"] = 2
    assert default_inference_config()["tensor_parallel"]["tp_size"] == 1


def test_deepspeeds_defaults_are_silent(params):
    assert init_inference(params, DEEPSPEEDS_DEFAULTS).arguments == {}


def test_a_config_may_be_a_file_and_is_merged_with_what_stands_beside_it(params, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"max_out_tokens": 100, "tp": {"tp_size": 2}, "min_out_tokens": 7}')
    engine = init_inference(params, str(file), max_tokens=100, tensor_parallel={"tp_grain_size": 64}, use_triton=True)
    assert engine.arguments.keys() == {"max_context", "mesh", "implementation"}
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="config.json: (can not be read as JSON|holds a list)"):
            init_inference(params, file)
    with pytest.raises(ConfigError, match="can not be read"):
        init_inference(params, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="config is a int"):
        init_inference(params, 3)


@pytest.mark.parametrize(
    "config, loose, name",
    [
        ({"max_out_tokens": 1}, {"max_out_tokens": 2}, "max_out_tokens"),
        ({"max_out_tokens": 1}, {"max_tokens": 2}, "max_out_tokens"),
        ({"mp_size": 1}, {"tp": {"tp_size": 2}}, "tensor_parallel.tp_size"),
        ({"checkpoint_config": {"base_dir": "a"}, "base_dir": "b"}, {}, "base_dir"),
        ({"max_out_tokens": 100, "state_manager": {"max_context": 64}}, {}, "max_out_tokens"),
    ],
)
def test_an_option_given_twice_with_different_values_is_refused(params, config, loose, name):
    with pytest.raises(ConfigError, match=f"{name} is given twice, as .* and as "):
        init_inference(params, config, **loose)


@pytest.mark.parametrize(
    "options, hint",
    [
        ({"max_out_token": 5}, "no option max_out_token; near ones: .*max_out_tokens"),
        ({"tensor_paralel": {}}, "no option tensor_paralel; near ones: tensor_parallel"),
        ({"tp": {"size": 2}}, "no option tensor_parallel.size; near ones: .*tensor_parallel.tp_size"),
        ({"tp_size": 2}, "no option tp_size; near ones: tensor_parallel.tp_size"),
        ({"quant": {"weights": {}}}, "no option quant.weights; near ones: quant.weight"),
        ({"colour": "red"}, "no option colour$"),
    ],
)
def test_an_unknown_option_is_refused_and_near_ones_are_named(params, options, hint):
    with pytest.raises(ConfigError, match=hint):
        init_inference(params, options)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"max_out_tokens": 0}, "max_out_tokens=0 should be a whole number of at least 1"),
        ({"max_out_tokens": float("inf")}, "max_out_tokens=inf should be a whole number"),
        ({"max_out_tokens": "100"}, "'100' should be a whole number"),
        ({"use_triton": 1}, "use_triton=1 should be true or false"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 should be an object"),
        ({"tensor_parallel": {"tp_size": True}}, "tp_size=True should be a whole number"),
        ({"min_out_tokens": 9, "max_out_tokens": 8}, "min_out_tokens=9 is more than max_out_tokens=8"),
        ({"use_triton": True, "kernel_inject": False}, "use_triton=True needs kernels"),
        (
            {"state_manager": {"max_ragged_sequence_count": 9, "max_ragged_batch_size": 8}},
            "max_ragged_sequence_count=9 is more than max_ragged_batch_size=8",
        ),
        ({"state_manager": {"memory_config": {"mode": "allocate"}}}, "'allocate' needs size"),
        ({"state_manager": {"memory_config": {"mode": "some"}}}, "mode='some'; there are 'reserve' and 'allocate'"),
        ({"state_manager": {"memory_config": {"size": -1}}}, "size=-1 should be a whole number of at least 0"),
        ({"dtype": "fp16", "checkpoint": "x"}, "dtype, checkpoint: these parameters are loaded already"),
    ],
)
def test_bad_values_are_refused(params, options, problem):
    with pytest.raises(ConfigError, match=problem):
        init_inference(params, options)


@pytest.mark.parametrize(
    "options",
    [
        {"triangular_masking": False},
        {"tm": False},
        {"injection_policy": {"Block": ("out",)}},
        {"injection_policy_tuple": ("out",)},
        {"quant": {"qkv": {"enabled": False}}},
        {"state_manager": {"offload": True}},
    ],
)
def test_what_would_change_results_is_refused(params, options):
    with pytest.raises(ConfigError, match="is not supported: "):
        init_inference(params, options)


def test_what_has_no_meaning_is_warned_of_once(params):
    options = {
        "enable_cuda_graph": True,
        "zero": {"stage": 3},
        "return_tuple": False,
        "ep_size": 2,
        "moe": {"num_experts": [8]},
        "tensor_parallel": {"tp_grain_size": 32, "mpu": object()},
        "replace_method": "manual",
        "set_empty_params": True,
        "quant": {"activation": {"num_bits": 4}},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert init_inference(params, options, training_mp_size=4).arguments == {}
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__
    text = str(warning.message)
    for named in ("enable_cuda_graph=True (XLA", "zero={'stage': 3} (", "return_tuple=False", "moe.ep_size=2"):
        assert named in text
    assert text.count("; ") >= 9


@pytest.mark.parametrize(
    "dtype, expected",
    [
        *(
            (spelling, "float16")
            for spelling in ("fp16", "half", "float16", "torch.float16", torch.float16, jnp.float16)
        ),
        *((spelling, "float32") for spelling in ("fp32", "float", torch.float, np.float32)),
        *((spelling, "bfloat16") for spelling in ("bf16", "torch.bfloat16", torch.bfloat16, jnp.dtype("bfloat16"))),
    ],
)
def test_dtype_in_all_its_spellings(module, dtype, expected):
    leaves = flatten(init_inference(module, dtype=dtype).params)
    assert {leaf.dtype.name for leaf in leaves.values()} == {expected}


@pytest.mark.parametrize("dtype", ["fp8", torch.float64, 7, object()])
def test_other_dtypes_are_refused(module, dtype):
    with pytest.raises(ConfigError, match="dtype=.* is not supported; there are float32, "):
        init_inference(module, dtype=dtype)


@pytest.mark.parametrize(
    "options, scheme",
    [
        ({"dtype": "int8"}, "q8_0"),
        ({"dtype": torch.int8}, "q8_0"),
        ({"quant": {"enabled": True}}, "q8_0"),
        ({"quant": {"weight": {"num_bits": 8}}, "dtype": "int8"}, "q8_0"),
        ({"quant": {"weight": {"num_bits": 4}}}, "q4_0"),
        ({"quant": {"weight": {"num_bits": 4, "q_type": "asymmetric"}}}, "q4_1"),
        ({"quant": {"enabled": False, "weight": {"num_bits": 4}}}, None),
        ({"quant": {}}, None),
        ({"quantization": {"quantization_mode": "wf6af16"}}, {"layers.*": "fp6"}),
        (
            {"weight_quantization": {"quantized_initialization": {"num_bits": 4, "group_size": 32, "group_dim": 1}}},
            "int4_asym",
        ),
        (
            {"quant": {"weight": {"post_init_quant": {"layers.0.self_attn.q_proj": SYMMETRIC, "self_attn": {}}}}},
            {"layers.0.attention.q.": "int4", "attention": "int8_asym_g32"},
        ),
    ],
)
def test_quantized_weights(module, options, scheme):
    expected = dsjax.prepare(dsjax.load(module, quantize=scheme))
    assert_equal_trees(init_inference(module, options).params, expected)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"quant": {"weight": {"num_bits": 6}}}, r"6 bits, .* there are 8 symmetric \(q8_0\), 4 symmetric"),
        ({"quant": {"weight": {"q_type": "asymmetric"}}}, "8 bits, q_type='asymmetric'"),
        ({"quant": {"weight": {"num_bits": 4}}, "dtype": "int8"}, "dtype=int8 and quant.weight.num_bits=4 contradict"),
        ({"quantization_mode": "wf4"}, "quantization_mode='wf4' is not supported; there is wf6af16"),
        (
            {"quantization_mode": "wf6af16", "quant": {"weight": {"num_bits": 8}}},
            "quantization_mode and .*num_bits: each",
        ),
        (post_init({"fc": {}}), "'fc' is in no name of a matrix, such as .*embed_tokens.weight"),
        (post_init({"mlp": {"bits": 4}}), r"\['mlp'\]=.* should be an object of num_bits, group_size"),
        (post_init({"mlp": {"num_bits": 6}}), "num_bits=6 should be 4 or 8"),
        (post_init({"mlp": {"group_dim": 0}}), "group_dim=0 is not supported: groups are along rows"),
        (post_init({"mlp": {"num_bits": 4, "group_size": 48}}), "groups of 48, which does not divide"),
    ],
)
def test_formats_that_are_not_there_are_refused(module, options, problem):
    with pytest.raises((ConfigError, ParameterError), match=problem):
        init_inference(module, options)


def test_what_is_saved_is_not_quantized_again(params, tmp_path):
    dsjax.save(params, tmp_path / "saved")
    for options in (post_init({"mlp": {}}), {"quantization_mode": "wf6af16"}, {"dtype": "int8"}):
        with pytest.raises(ConfigError, match="was saved by dsjax.save and is loaded as it is"):
            init_inference(tmp_path / "saved", options)


def test_a_folder_brings_its_tokenizer(folder, module, tmp_path):
    engine = init_inference(folder, dtype="fp32")
    assert engine.tokenizer.encode("é 🦊") == testing.tiny_tokenizer().encode("é 🦊")
    np.testing.assert_array_equal(engine.params["embed"]["weight"], module.model.embed_tokens.weight.detach().numpy())
    own = testing.tiny_tokenizer()
    assert init_inference(folder, tokenizer=own).tokenizer is own
    assert init_inference(module).tokenizer is None
    assert init_inference(module, tokenizer=folder).tokenizer.vocab_size == own.vocab_size


def test_a_dictionary_comes_with_the_config_of_its_model(module):
    engine = init_inference(module.state_dict(), {"args": module.config})
    assert_equal_trees(engine.params, dsjax.prepare(dsjax.load(module)))


def test_a_checkpoint_in_place_of_the_models_weights(folder, module):
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(module.config)
    expected = dsjax.prepare(dsjax.load(module))
    names = {"checkpoint": folder}, {"checkpoint": folder.name, "base_dir": str(folder.parent)}
    for options in (*names, {"checkpoint_config": {"checkpoint_dir": str(folder)}}):
        engine = init_inference(empty, options)
        assert_equal_trees(engine.params, expected)
        assert engine.tokenizer is not None
    wide = transformers.LlamaConfig(**(module.config.to_dict() | {"intermediate_size": 96}))
    with torch.device("meta"), pytest.raises(ConfigError, match="intermediate_size is 64, .* is 96"):
        init_inference(transformers.LlamaForCausalLM(wide), checkpoint=folder)
    with pytest.raises(ConfigError, match="leave one out"):
        init_inference(module.state_dict(), checkpoint=folder)


def test_descriptors(tmp_path, loaded):
    for name in ("a.bin", "b.bin", "mp_rank_00/model_rng.pt", "mp_rank_01/model_rng.pt", "other/c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pieces = {"type": "BLOOM", "checkpoints": ["a.bin", "b.bin"], "version": 1.0}
    ranks = {"type": "Megatron", "checkpoints": ["mp_rank_00/model_rng.pt", "mp_rank_01/model_rng.pt"], "tp_size": 2}
    file = tmp_path / "descriptor.json"
    file.write_text(json.dumps(pieces))
    for checkpoint, base in (
        (pieces, tmp_path),
        (pieces | {"base_dir": str(tmp_path)}, ""),
        (str(file), ""),
        ("descriptor.json", tmp_path),
        (ranks, tmp_path),
        (ranks | {"checkpoints": ranks["checkpoints"][:1]}, tmp_path),
    ):
        init_inference(None, checkpoint=checkpoint, base_dir=base)
        assert loaded.pop() == tmp_path
    (tmp_path / "config.json").touch()
    init_inference(None, checkpoint=pieces | {"checkpoints": "a.bin"}, base_dir=tmp_path)
    assert loaded.pop() == tmp_path / "a.bin"

    (tmp_path / "other.safetensors").touch()
    for change, problem in (
        ({"checkpoints": ["a.bin", "none.bin"]}, "none.bin: named by the checkpoint's descriptor, and not there"),
        ({"checkpoints": ["a.bin", "other/c.bin"]}, "several folders"),
        ({}, "safetensors beside the files named"),
        ({"checkpoints": []}, "should be a list of files"),
        ({"checkpoints": {"tp": ["a.bin"], "non_tp": ["b.bin"]}}, "save_mp_checkpoint_path is not read"),
        ({"type": "ds_model"}, "save_mp_checkpoint_path is not read"),
        ({"basedir": "x"}, "no option checkpoint.basedir; near ones: checkpoint.base_dir"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=problem):
            init_inference(None, checkpoint=pieces | change, base_dir=tmp_path)
    with pytest.raises(ConfigError, match="checkpoint is a int"):
        init_inference(None, checkpoint=3)
    assert not loaded


def test_what_was_loaded_can_be_kept(folder, tmp_path):
    kept = tmp_path / "kept"
    for _ in range(2):
        engine = init_inference(folder, dtype="int8", save_mp_checkpoint_path=kept)
    again = init_inference(None, checkpoint=kept)
    assert_equal_trees(again.params, engine.params)
    assert again.tokenizer.vocab_size == engine.tokenizer.vocab_size


def test_too_little_memory_for_the_least_tokens_is_an_error(params):
    assert init_inference(params, min_out_tokens=160).arguments == {}
    with pytest.raises(ConfigError, match="min_out_tokens=161: there is room for 160 tokens"):
        init_inference(params, min_out_tokens=161)
    assert Recorder.last.released
