"""llama.cpp's model architectures: GGUF metadata as a `ModelConfig`, and llama.cpp's tensor names as a weight map."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.config import ModelConfig, RopeScaling
from dsjax.errors import CheckpointError, ConfigError
from policies.base import Copy, Entry, InterleavedRotary, TensorSource, WeightMap

_LINEARS = {
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def _decoder_weights(rotary: Copy | InterleavedRotary, *, qk_norm: bool = False) -> WeightMap:
    kinds, normed = ("weight", "bias"), "qk" if qk_norm else ""
    return WeightMap(
        entries=(
            Entry("embed.weight", "token_embd.weight"),
            Entry("layers.{i}.attention_norm.scale", "blk.{i}.attn_norm.weight"),
            Entry("layers.{i}.mlp_norm.scale", "blk.{i}.ffn_norm.weight"),
            *(
                Entry(f"layers.{{i}}.attention.{part}_norm.scale", f"blk.{{i}}.attn_{part}_norm.weight")
                for part in normed
            ),
            *(
                Entry(f"layers.{{i}}.attention.{part}.{kind}", f"blk.{{i}}.attn_{part}.{kind}", rotary)
                for part in "qk"
                for kind in kinds
            ),
            *(
                Entry(f"layers.{{i}}.{leaf}.{kind}", f"blk.{{i}}.{tensor}.{kind}")
                for leaf, tensor in _LINEARS.items()
                for kind in kinds
            ),
            Entry("final_norm.scale", "output_norm.weight"),
            Entry("head.weight", "output.weight"),
        ),
        # The rotary factors become part of the config; older files also stored them for each layer.
        ignored=(r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd"),
    )


# llama.cpp rotates neighbouring rows in "llama" (which Mistral files name too), half a head apart in the others.
_WEIGHTS = {
    "llama": _decoder_weights(InterleavedRotary()),
    "qwen2": _decoder_weights(Copy()),
    "qwen3": _decoder_weights(Copy(), qk_norm=True),
}

# Keys below "<architecture>." that do not change what the model computes.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
# Keys that are fine only at the value which means "not used".
_FIXED: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
}


class _Metadata:
    """The keys below "<architecture>." with types checked, and a record of those that were asked for."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, origin: str):
        self.prefix, self.origin = f"{architecture}.", origin
        self.values = {
            key.removeprefix(self.prefix): value for key, value in metadata.items() if key.startswith(self.prefix)
        }
        self.asked = set(_HARMLESS)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.origin}: metadata field {self.prefix}{key} is missing")
            return default
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        if kind is float and isinstance(value, int):
            return float(value)
        shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise ConfigError(f"{self.origin}: {self.prefix}{key} is {shown}; only one {kind.__name__} is read")

    def refuse_others(self) -> None:
        for key, value in self.values.items():
            if key in self.asked or (key in _FIXED and value == _FIXED[key]):
                continue
            raise ConfigError(
                f"{self.origin}: metadata field {self.prefix}{key}={value!r} is not supported and may change what the "
                "model computes"
            )


def gguf_weights(architecture: str) -> WeightMap:
    """The weight map of a `general.architecture`.

    Raises:
      ConfigError: the architecture is not supported; the message lists those that are.
    """
    if architecture not in _WEIGHTS:
        raise ConfigError(f"GGUF architecture '{architecture}' is not supported; supported are: {', '.join(_WEIGHTS)}")
    return _WEIGHTS[architecture]


def gguf_token_ids(metadata: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a text, or `None`, and the ids that end a generation: end of text, of turn, of message.

    Raises:
      ConfigError: one is not an integer.
    """
    bos, *ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    for value in (bos, *ends):
        if value is not None and not isinstance(value, int):
            raise ConfigError(f"a special token's id in the metadata is {value!r}, not an integer")
    return bos, tuple(dict.fromkeys(end for end in ends if end is not None))


def gguf_config(metadata: Mapping[str, Any], source: TensorSource) -> ModelConfig:
    """Configuration of a GGUF file.

    Args:
      metadata: its key-value section.
      source: its tensors: which of them exist says whether there are biases and a head of its own, and
        `rope_freqs.weight` holds rotary factors.

    Raises:
      ConfigError: the architecture is not supported, or a metadata field is missing, malformed or not supported.
      CheckpointError: there is no embedding.
    """
    architecture = str(metadata.get("general.architecture"))
    gguf_weights(architecture)
    get = (fields := _Metadata(metadata, architecture, source.origin)).get
    shapes = source.shapes()
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{source.origin}: the embedding 'token_embd.weight' is missing or not a matrix")
    vocab, hidden = shapes["token_embd.weight"]
    if get("embedding_length", int) != hidden:
        raise CheckpointError(
            f"{source.origin}: tensor 'token_embd.weight' has shape {[vocab, hidden]}, but the metadata says "
            f"{architecture}.embedding_length={get('embedding_length', int)}"
        )
    heads, layers = get("attention.head_count", int), get("block_count", int)
    if "attention.key_length" not in fields.values and (heads < 1 or hidden % heads):
        raise ConfigError(f"{source.origin}: {heads} heads do not divide embedding_length={hidden}")
    head_dim = get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise ConfigError(
                f"{source.origin}: metadata field {architecture}.{key}={get(key, int)} is not supported; only the "
                f"head size {head_dim} is"
            )
    window = get("attention.sliding_window", int, 0)
    bos_id, eos_ids = gguf_token_ids(metadata)
    config = ModelConfig(
        # Mistral files name the architecture "llama"; a window is what tells them apart in Hugging Face's terms.
        model_type="mistral" if architecture == "llama" and window else architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_context=get("context_length", int),
        norm_eps=get("attention.layer_norm_rms_epsilon", float),
        rope_theta=get("rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(fields, source, head_dim),
        attention_bias="blk.0.attn_q.bias" in shapes,
        attention_out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm=architecture == "qwen3",
        tie_embeddings="output.weight" not in shapes,
        windows=(window,) * layers if window else (),
        bos_id=bos_id,
        eos_ids=eos_ids,
    )
    fields.refuse_others()
    return config


def _rope_scaling(fields: _Metadata, source: TensorSource, head_dim: int) -> RopeScaling | None:
    # llama.cpp takes linear scaling when a factor is given and no type; 0 and 1 both mean none.
    factor = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 0.0))
    kind = fields.get("rope.scaling.type", str, "linear")
    fields.get("rope.scaling.original_context_length", int, 0)
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"{source.origin}: metadata field {fields.prefix}rope.scaling.type={kind} is not supported; none and "
            "linear are"
        )
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if "rope_freqs.weight" not in source.shapes():
        return RopeScaling("linear", factor=factor) if linear else None
    if linear:
        raise ConfigError(f"{source.origin}: rope.scaling.factor={factor} and 'rope_freqs.weight' are both given")
    if source.shapes()["rope_freqs.weight"] != (head_dim // 2,):
        raise CheckpointError(
            f"{source.origin}: tensor 'rope_freqs.weight' has shape {list(source.shapes()['rope_freqs.weight'])}, but "
            f"a head of {head_dim} needs {[head_dim // 2]}"
        )
    factors = np.asarray(source.read("rope_freqs.weight"), np.float32).tolist()
    return None if set(factors) == {1.0} else RopeScaling("factors", factors=tuple(factors))
