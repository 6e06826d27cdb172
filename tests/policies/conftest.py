"""Tiny checkpoints in each format, and sources that need no file."""

import gguf
import numpy as np
import pytest
import torch
import transformers

from dsjax.config import ModelConfig

SIZES = dict(
    vocab_size=37,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
}


@pytest.fixture
def make_config():
    """A config of four heads of 16, two of them shared, with any field replaced."""

    def make(**overrides) -> ModelConfig:
        sizes = dict(vocab_size=37, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2)
        return ModelConfig(**(dict(model_type="llama", head_dim=16, max_context=128) | sizes | overrides))

    return make


@pytest.fixture
def save_hf(tmp_path):
    """Saves a random tiny model of a family as transformers does; returns `(folder, model)`."""

    def save(family: str, *, dtype=torch.float32, folder="model", shard="5GB", **overrides):
        model_class = CLASSES[family]
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**(SIZES | overrides))).to(dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(".bias"):
                    weight.normal_()
        model.save_pretrained(tmp_path / folder, max_shard_size=shard)
        return tmp_path / folder, model

    return save


@pytest.fixture
def write_gguf(tmp_path):
    """Writes a GGUF file of given tensors and metadata; returns its path."""

    def write(tensors, metadata, architecture="llama", name="model.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in metadata.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for tensor, data in tensors.items():
            raw, kind = data if isinstance(data, tuple) else (data, None)
            writer.add_tensor(tensor, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture
def gguf_parts():
    """Tensors and metadata of a tiny GGUF model; matrices are stored as `kind`, vectors in float32."""

    def make(architecture="llama", kind=gguf.GGMLQuantizationType.F32, *, tied=False, bias=False, hidden=64, ffn=96):
        draw = np.random.default_rng(0)

        def matrix(*shape):
            return gguf.quantize(draw.standard_normal(shape, np.float32), kind), kind

        def vector(size):
            return draw.standard_normal(size, np.float32)

        sizes = {"attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden)}
        sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden)}
        sizes |= {"ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
        tensors = {"token_embd.weight": matrix(37, hidden), "output_norm.weight": vector(hidden)}
        if not tied:
            tensors["output.weight"] = matrix(37, hidden)
        for i in range(2):
            for norm in ("attn_norm", "ffn_norm"):
                tensors[f"blk.{i}.{norm}.weight"] = vector(hidden)
            for name, shape in sizes.items():
                tensors[f"blk.{i}.{name}.weight"] = matrix(*shape)
            if bias:
                for name in ("attn_q", "attn_k", "attn_v"):
                    tensors[f"blk.{i}.{name}.bias"] = vector(sizes[name][0])
            if architecture == "qwen3":
                for norm in ("attn_q_norm", "attn_k_norm"):
                    tensors[f"blk.{i}.{norm}.weight"] = vector(hidden // 4)
        metadata = {
            "block_count": 2,
            "context_length": 128,
            "embedding_length": hidden,
            "feed_forward_length": ffn,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0,
        }
        return tensors, {f"{architecture}.{key}": value for key, value in metadata.items()}

    return make
