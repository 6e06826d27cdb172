"""Folders in each quantized format: the file's integers and scales, and the logits of the dequantized model."""

import functools
import json

import jax
import numpy as np
import pytest
import quantized_packers as packers
import torch
import transformers
from safetensors.torch import load_file, save_file

import dsjax
import policies
from dsjax.errors import CheckpointError
from dsjax.params import flatten
from dsjax.quantization import QuantizedArray

SIZES = dict(
    vocab_size=37,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 24))
MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}
MODULES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
ACT = functools.partial(packers.gptq, symmetric=False, act_order=True, version=2)
CASES = {
    "gptq": (packers.gptq, GPTQ, "int4,scale_dtype=float16"),
    "gptq act-order": (
        ACT,
        GPTQ | {"sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
        "int4_asym,scale_dtype=float16",
    ),
    "gptq 8 bits": (functools.partial(packers.gptq, bits=8), GPTQ | {"bits": 8}, "int8_g32,scale_dtype=float16"),
    "awq": (packers.awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "int4_asym,scale_dtype=float16"),
    "fp8": (packers.fp8, FP8, "fp8_e4m3_rows32_g32"),
    "compressed-tensors": (packers.compressed_tensors, PACKED, "int4_asym,scale_dtype=float16"),
    "compressed-tensors act-order": (
        functools.partial(packers.compressed_tensors, act_order=True),
        PACKED,
        "int4_asym,scale_dtype=float16",
    ),
    "compressed-tensors fp8 blocks": (
        packers.fp8_blocks,
        PACKED | {"format": "float-quantized", "config_groups": {"group_0": {"weights": BLOCKS}}},
        "fp8_e4m3_rows32_g32",
    ),
    "mxfp4": (packers.mxfp4_rows, PACKED | {"format": "mxfp4-pack-quantized"}, "mxfp4"),
    "w8a8": (packers.w8a8, PACKED | {"format": "int-quantized"}, "int8"),
    "nvfp4": (packers.nvfp4, PACKED | {"format": "nvfp4-pack-quantized"}, "nvfp4"),
    "nf4": (packers.nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4,scale_dtype=float32"),
    "bitsandbytes int8": (packers.int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    "hqq": (packers.hqq, {"quant_method": "hqq", "skip_modules": ["lm_head"]}, "int4_asym,scale_dtype=float16"),
    "torchao": (packers.torchao, {"quant_method": "torchao"}, "int8"),
}


def tensor_of(array):
    """A torch tensor of a numpy array, also of dtypes that numpy has from ml_dtypes."""
    array = np.ascontiguousarray(array)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def write(folder, pack, quantization, extra=()):
    """A tiny Llama with quantized projections; the dequantized model, and the parts of each leaf."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    rng = np.random.default_rng(0)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    leaves = {}
    for layer in range(2):
        for leaf, name in MODULES.items():
            module = model.get_submodule(f"model.layers.{layer}.{name}")
            with torch.no_grad():
                module.weight.mul_(8)  # so that a wrong one shows in the logits
            stored, rounded, parts = pack(module.weight.detach().numpy(), rng)
            module.weight.data = torch.from_numpy(rounded)
            del tensors[f"model.layers.{layer}.{name}.weight"]
            tensors |= {f"model.layers.{layer}.{name}.{part}": tensor_of(array) for part, array in stored.items()}
            block = "mlp" if name.startswith("mlp") else "attention"
            leaves[f"layers.{layer}.{block}.{leaf}.weight"] = parts | {"dequantized": rounded}
    save_folder(folder, tensors | dict(extra), model.config.to_dict() | {"quantization_config": quantization})
    return model, leaves


def save_folder(folder, tensors, config):
    """A checkpoint of transformers'."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, default=str))


def read_by_transformers(folder, quantization):
    """The checkpoint as transformers reads and dequantizes it."""
    quantization.dequantize = True
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype="float32")


def logits_of(model):
    """transformers' logits."""
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    assert logits.std() > 0.1
    return logits


def codes_of(leaf):
    """The codes of a leaf, one a weight; integers counted from 0."""
    values = np.asarray(leaf.values)
    if leaf.scheme.bits == 8:
        return values
    runs = values.reshape(*values.shape[:-1], -1, 16)
    return np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(leaf.shape)


def check_leaf(leaf, scheme, expected):
    """A leaf has the codes and scales of the file."""
    assert isinstance(leaf, QuantizedArray) and leaf.scheme.name == scheme
    codes = expected["codes"]
    if leaf.values.dtype == np.int8 and codes.dtype == np.uint8:
        codes = (codes.astype(np.int32) - 128).astype(np.int8)
    np.testing.assert_array_equal(codes_of(leaf), codes)
    np.testing.assert_array_equal(leaf.scales, expected["scales"])
    for name in ("zeros", "permutation"):
        part, found = expected.get(name), getattr(leaf, name)
        assert (found is None) == (part is None), name
        if part is not None:
            np.testing.assert_array_equal(found, part)


@jax.jit
def dequantized(params):
    """The tree with plain leaves."""

    def is_quantized(leaf):
        return isinstance(leaf, QuantizedArray)

    return jax.tree.map(lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


@pytest.fixture(scope="module")
def dense_logits():
    """Logits of a tree with plain leaves: one program for all cases."""
    return jax.jit(dsjax.logits)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_as_it_is(tmp_path, dense_logits, case):
    pack, quantization, scheme = CASES[case]
    # Older GPTQ files have biases of zero where the model has none.
    extra = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)} if "gptq" in case else {}
    model, expected = write(tmp_path / "model", pack, quantization, extra)
    params = policies.load(tmp_path / "model")
    leaves = flatten(params)
    assert {path for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)} == expected.keys()
    for path, parts in expected.items():
        # Blocks of 64 do not divide rows of 96.
        check_leaf(leaves[path], "nf4_g32,scale_dtype=float32" if case == "nf4" and "down" in path else scheme, parts)
    plain = dequantized(params)
    for path, parts in expected.items():
        np.testing.assert_allclose(flatten(plain)[path], parts["dequantized"], rtol=2e-6, atol=1e-7)
    if case == "fp8":  # which transformers dequantizes itself
        model = read_by_transformers(tmp_path / "model", transformers.FineGrainedFP8Config(weight_block_size=(32, 32)))
    logits = logits_of(model)
    np.testing.assert_allclose(dense_logits(plain, TOKENS), logits, atol=1e-3)
    if case == "gptq act-order":
        fused = dsjax.prepare(params)
        assert "q" in fused["layers"]["0"]["attention"], "weights with inputs of their own are not joined"
        np.testing.assert_allclose(dsjax.logits(fused, TOKENS), logits, atol=1e-3)


def experts(name, changes):
    """A model with experts that has one layer, and its weights."""
    torch.manual_seed(0)
    sizes = SIZES | dict(num_hidden_layers=1, num_experts_per_tok=2) | changes
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    changes = dict(head_dim=16, num_local_experts=3, intermediate_size=32, layer_types=["full_attention"])
    model, tensors = experts("GptOss", changes)
    expected = {}
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        weight = tensors.pop(key).transpose(-1, -2).numpy()  # plain ones are [E, in, out]
        stored, _, parts = packers.mxfp4(weight, None)
        tensors |= {key + part: tensor_of(array) for part, array in stored.items()}
        expected[name] = parts
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    save_folder(tmp_path / "model", tensors, config)
    params = policies.load(tmp_path / "model")
    found = params["layers"]["0"]["mlp"]["experts"]
    check_leaf(found["down"]["weight"], "mxfp4", expected["down_proj"])
    for start, leaf in enumerate(("gate", "up")):  # in turn
        parts = {name: part[:, start::2] for name, part in expected["gate_up_proj"].items()}
        check_leaf(found[leaf]["weight"], "mxfp4", parts)
    theirs = read_by_transformers(tmp_path / "model", transformers.Mxfp4Config())
    np.testing.assert_allclose(dsjax.logits(dequantized(params), TOKENS), logits_of(theirs), atol=1e-3)


@pytest.mark.parametrize("form", ["one by one", "stacked"])
def test_experts_with_blocks(tmp_path, form):
    model, tensors = experts(
        "Qwen3Moe", dict(head_dim=16, num_experts=3, moe_intermediate_size=48, num_local_experts=3)
    )
    prefix = "model.layers.0.mlp.experts"
    weights = {name: tensors.pop(f"{prefix}.{name}").numpy() for name in ("gate_up_proj", "down_proj")}
    weights["gate_proj"], weights["up_proj"] = np.split(weights["gate_up_proj"], 2, axis=1)
    expected = {}
    for name in ("gate_proj", "up_proj", "down_proj") if form == "one by one" else ("gate_up_proj", "down_proj"):
        each = [packers.fp8(weight, None) for weight in weights[name]]
        expected[name] = {part: np.stack([one[2][part] for one in each]) for part in ("codes", "scales")}
        if form == "stacked":
            tensors[f"{prefix}.{name}"] = tensor_of(expected[name]["codes"])
            tensors[f"{prefix}.{name}_scale_inv"] = tensor_of(expected[name]["scales"])
        else:
            for i, (stored, *_) in enumerate(each):
                tensors |= {f"{prefix}.{i}.{name}.{part}": tensor_of(array) for part, array in stored.items()}
    save_folder(tmp_path / "model", tensors, model.config.to_dict() | {"quantization_config": FP8})
    found = policies.load(tmp_path / "model")["layers"]["0"]["mlp"]["experts"]
    check_leaf(found["down"]["weight"], "fp8_e4m3_rows32_g32", expected["down_proj"])
    if form == "one by one":
        check_leaf(found["up"]["weight"], "fp8_e4m3_rows32_g32", expected["up_proj"])
    else:  # rows 48 to 96 do not begin a block, so each row gets its scales
        both = expected["gate_up_proj"]
        scales = both["scales"].repeat(32, axis=1)
        check_leaf(
            found["up"]["weight"],
            "fp8_e4m3_g32,scale_dtype=float32",
            {"codes": both["codes"][:, 48:], "scales": scales[:, 48:]},
        )


def test_rows_of_a_joined_tensor_share_its_inputs(tmp_path):
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES | dict(num_hidden_layers=1, pad_token_id=0)))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key = "model.layers.0.self_attn.qkv_proj"
    stored, _, parts = ACT(tensors.pop(f"{key}.weight").numpy(), np.random.default_rng(0))
    tensors |= {f"{key}.{part}": tensor_of(array) for part, array in stored.items()}
    config = model.config.to_dict() | {"quantization_config": CASES["gptq act-order"][1]}
    save_folder(tmp_path / "model", tensors, config)
    found = policies.load(tmp_path / "model")["layers"]["0"]["attention"]
    for leaf, rows in {"q": slice(64), "k": slice(64, 96), "v": slice(96, 128)}.items():
        expected = {name: parts[name][rows] for name in ("codes", "scales", "zeros")}
        check_leaf(
            found[leaf]["weight"], "int4_asym,scale_dtype=float16", expected | {"permutation": parts["permutation"]}
        )


def test_tensors_in_memory(tmp_path):
    """As a folder with the same tensors."""
    write(tmp_path / "model", packers.fp8, FP8)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    from_memory = policies.load(load_file(tmp_path / "model" / "model.safetensors"), config=raw)
    jax.tree.map(np.testing.assert_array_equal, from_memory, policies.load(tmp_path / "model"))


def test_stored_formats_and_dequantizing_on_the_way(tmp_path):
    _, expected = write(tmp_path / "model", packers.awq, CASES["awq"][1])
    source = policies.loading.open_checkpoint(tmp_path / "model")
    kind, nbytes = source.stored("model.layers.0.mlp.up_proj.weight")
    assert kind == "int4_asym" and nbytes == 96 * 64 // 2 + 96 * 2 * 2 + 96 * 2 // 2
    plain = flatten(policies.load(tmp_path / "model", quantize="none"))
    for path, parts in expected.items():
        assert isinstance(plain[path], jax.Array)
        np.testing.assert_allclose(plain[path], parts["dequantized"], rtol=1e-6)


def test_a_bias_that_is_not_zero(tmp_path):
    write(tmp_path / "model", packers.gptq, GPTQ, {"model.layers.0.mlp.up_proj.bias": torch.ones(96)})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.up_proj\.bias' \[96\] has no place in a llama"):
        policies.load(tmp_path / "model")


def test_experts_that_are_not_stored_alike(tmp_path):
    changes = dict(num_local_experts=2, intermediate_size=64)
    model, tensors = experts("Mixtral", changes)
    prefix = "model.layers.0"
    weights = {name: tensors.pop(f"{prefix}.mlp.experts.{name}").numpy() for name in ("gate_up_proj", "down_proj")}
    tensors[f"{prefix}.block_sparse_moe.gate.weight"] = tensors.pop(f"{prefix}.mlp.gate.weight")
    for i in range(2):
        for name, weight in zip(("w1", "w3"), np.split(weights["gate_up_proj"][i], 2), strict=True):
            tensors[f"{prefix}.block_sparse_moe.experts.{i}.{name}.weight"] = tensor_of(weight)
        stored = {"weight": weights["down_proj"][i]} if i else packers.gptq(weights["down_proj"][i], None)[0]
        key = f"{prefix}.block_sparse_moe.experts.{i}.w2"
        tensors |= {f"{key}.{part}": tensor_of(array) for part, array in stored.items()}
    save_folder(tmp_path / "model", tensors, model.config.to_dict() | {"quantization_config": GPTQ})
    with pytest.raises(CheckpointError, match=r"stored in several ways \(float32, int4,scale_dtype=float16\)"):
        policies.load(tmp_path / "model")
