"""What keys and tensors of a GGUF file say about a model, as fields of `ModelConfig`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsjax.config import RopeScaling
from dsjax.errors import CheckpointError, ConfigError
from policies.base import TensorSource
from policies.rope_fields import yarn_mscale

# Keys below "<architecture>." that do not change what the model computes.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
# Keys that are fine only at the value which means "not used", or that llama.cpp takes if there are none.
_FIXED: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_gating_func": 1,  # softmax
    "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def _decimal(value: Any) -> float:
    """The shortest number that has this value in the file's 32 bits: what was in the config.json that it came from."""
    return float(str(np.float32(value)))


class Metadata:
    """The keys below "<architecture>." with types checked, and a record of those that were asked for.

    Args:
      metadata: the key-value section.
      architecture: what the keys begin with.
      source: the file's tensors.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: TensorSource):
        self.prefix, self.origin, self.source = f"{architecture}.", source.origin, source
        self.tensors = source.shapes()
        self.values = {
            key.removeprefix(self.prefix): value for key, value in metadata.items() if key.startswith(self.prefix)
        }
        self.asked = set()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key.

        Args:
          key: without the architecture.
          kind: its type; `float` takes an integer too.
          default: of an absent key; `None` makes the key required.

        Raises:
          ConfigError: the key is missing, or of another type.
        """
        self.asked.add(key)
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.origin}: metadata field {self.prefix}{key} is missing")
            return default
        if kind is float and isinstance(value, float | int) and not isinstance(value, bool):
            return _decimal(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise ConfigError(f"{self.origin}: {self.prefix}{key} is {shown}; only one {kind.__name__} is read")

    def has(self, tensor: str) -> bool:
        """Whether the first layer has a tensor of this name."""
        return f"blk.0.{tensor}" in self.tensors

    def refuse_others(self, harmless: frozenset[str], fixed: Mapping[str, Any]) -> None:
        """Check that nothing is left that could change what the model computes.

        Args:
          harmless: further keys that do not.
          fixed: further keys that must have the given value.

        Raises:
          ConfigError: names the first key that was not asked for.
        """
        fixed = {**_FIXED, **fixed}
        for key, value in self.values.items():
            if key in self.asked or value == fixed.get(key, object()):
                continue
            if key in fixed or key not in _HARMLESS | harmless:
                raise ConfigError(
                    f"{self.origin}: metadata field {self.prefix}{key}={value!r} is not supported and may change what "
                    "the model computes"
                )


# What a reader gives: fields of `ModelConfig` (`"experts.count"` for nested ones) from the file and those known so far.
Reader = Callable[[Metadata, Mapping[str, Any]], dict[str, Any]]


def sizes(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """What every architecture has; whether there are biases and a head is read from the tensors."""
    get, origin = file.get, file.origin
    embedding = file.tensors.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise CheckpointError(f"{origin}: the embedding 'token_embd.weight' is missing or not a matrix")
    vocab, hidden = embedding
    if get("embedding_length", int) != hidden:
        raise CheckpointError(
            f"{origin}: tensor 'token_embd.weight' has shape {[vocab, hidden]}, but the metadata says "
            f"{file.prefix}embedding_length={get('embedding_length', int)}"
        )
    kind = "epsilon" if known.get("norm") == "layer" else "rms_epsilon"
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_layers": get("block_count", int),
        "num_heads": get("attention.head_count", int),
        "max_context": get("context_length", int),
        "norm_eps": get(f"attention.layer_norm_{kind}", float),
        "norm_bias": "output_norm.bias" in file.tensors,
        "attention_bias": file.has("attn_q.bias") or file.has("attn_qkv.bias"),
        "attention_out_bias": file.has("attn_output.bias"),
        "mlp_bias": file.has("ffn_down.bias"),
        "tie_embeddings": "output.weight" not in file.tensors,
        "head_bias": "output.bias" in file.tensors,
    }


def heads(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Size of heads, and how many keys have."""
    count, hidden = known["num_heads"], known["hidden_size"]
    if "attention.key_length" not in file.values and (count < 1 or hidden % count):
        raise ConfigError(f"{file.origin}: {count} heads do not divide embedding_length={hidden}")
    head_dim = file.get("attention.key_length", int, hidden // max(count, 1))
    _only(file, "attention.value_length", head_dim)
    return {"num_kv_heads": file.get("attention.head_count_kv", int, count), "head_dim": head_dim}


def _only(file: Metadata, key: str, head_dim: int) -> None:
    if file.get(key, int, head_dim) != head_dim:
        raise ConfigError(
            f"{file.origin}: metadata field {file.prefix}{key}={file.get(key, int)} is not supported; only the head "
            f"size {head_dim} is"
        )


def rotary(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base and scaling, where whole heads are rotated."""
    _only(file, "rope.dimension_count", known["head_dim"])
    return part_rotary(file, known)


def part_rotary(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base and scaling, and how much of a head is rotated."""
    size = file.get("rope.dimension_count", int, known["head_dim"])
    return {
        "rotary_dim": None if size == known["head_dim"] else size,
        "rope_theta": file.get("rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, size, known["max_context"]),
    }


def rope_scaling(file: Metadata, size: int, context: int) -> RopeScaling | None:
    """Rotary scaling.

    Args:
      file: what it is read from.
      size: how much of a head is rotated.
      context: longest sequence.

    Raises:
      ConfigError: the kind of scaling is not supported, or two are given.
      CheckpointError: the factors do not fit a head.
    """
    get, name = file.get, f"{file.prefix}rope.scaling"
    # llama.cpp takes linear scaling when a factor is given and no type; 0 and 1 both mean none.
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 0.0))
    kind = get("rope.scaling.type", str, "linear")
    original = get("rope.scaling.original_context_length", int, 0) or context
    if "rope_factors_short.weight" in file.tensors and kind in ("longrope", "linear") and factor in (0.0, 1.0):
        return RopeScaling(
            "longrope",
            original_context=original,
            factors=_factors(file, "rope_factors_short.weight", size),
            long_factors=_factors(file, "rope_factors_long.weight", size),
            attention_factor=get("rope.scaling.attn_factor", float, 1.0),
        )
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{file.origin}: metadata field {name}.type={kind} is not supported; none, linear and yarn are"
        )
    if kind == "yarn" and factor == 0:
        raise ConfigError(f"{file.origin}: metadata field {name}.type=yarn is not supported without {name}.factor")
    scales = kind != "none" and factor not in (0.0, 1.0)
    given = "rope_freqs.weight" if "rope_freqs.weight" in file.tensors else "rope_factors_short.weight"
    if given not in file.tensors:
        if kind == "yarn":
            return _yarn(file, factor, original)
        return RopeScaling("linear", factor=factor) if scales else None
    if scales or given != "rope_freqs.weight":
        raise ConfigError(f"{file.origin}: rope.scaling.factor={factor} and '{given}' are both given")
    factors = _factors(file, given, size)
    return None if set(factors) == {1.0} else RopeScaling("factors", factors=factors)


def _yarn(file: Metadata, factor: float, original: int) -> RopeScaling:
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=file.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=file.get("rope.scaling.yarn_beta_slow", float, 1.0),
        # The key is what llama.cpp multiplies the usual factor by.
        attention_factor=yarn_mscale(factor) * file.get("rope.scaling.attn_factor", float, 1.0),
    )


def _factors(file: Metadata, tensor: str, size: int) -> tuple[float, ...]:
    if file.tensors.get(tensor) != (size // 2,):
        raise CheckpointError(
            f"{file.origin}: tensor '{tensor}' has shape {list(file.tensors.get(tensor, ()))}, but a head of {size} "
            f"needs {[size // 2]}"
        )
    return tuple(map(_decimal, np.asarray(file.source.read(tensor), np.float32)))


def windows(period: int = 0, default: int = 0) -> Reader:
    """Reader of the sliding window of each layer.

    Args:
      period: of so many layers the last has none, unless the file says another number or lists the layers; 0 gives one
        to all.
      default: window of files that lack the key.
    """

    def read(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
        window, layers = file.get("attention.sliding_window", int, default), known["num_layers"]
        if not window:
            return {}
        listed = file.values.get("attention.sliding_window_pattern")
        if isinstance(listed, list):
            file.asked.add("attention.sliding_window_pattern")
            if len(listed) < layers:
                raise ConfigError(
                    f"{file.origin}: {file.prefix}attention.sliding_window_pattern names {len(listed)} layers, the "
                    f"model has {layers}"
                )
            has_window = [bool(listed[i]) for i in range(layers)]
        else:
            every = file.get("attention.sliding_window_pattern", int, period)
            has_window = [every == 0 or i % every < every - 1 for i in range(layers)]
        return {"windows": tuple(window if has else None for has in has_window) if any(has_window) else ()}

    return read


def experts(*, renormalize: bool = True, shared: bool = False) -> Reader:
    """Reader of a mixture of experts in every layer, if there is one.

    Args:
      renormalize: the weights of a token's experts add up to 1, unless the file says otherwise.
      shared: there is a network that all tokens pass.
    """

    def read(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
        count = file.get("expert_count", int, 0)
        if not count:
            return {}

        def size(key: str, tensor: str) -> int:
            rows = file.tensors.get(f"blk.0.{tensor}", (known["intermediate_size"], 0))[-2]
            return file.get(key, int, rows)

        found = {
            "experts.count": count,
            "experts.per_token": file.get("expert_used_count", int),
            "experts.size": size("expert_feed_forward_length", "ffn_up_exps.weight"),
            "experts.renormalize": file.get("expert_weights_norm", bool, renormalize),
            "experts.scale": file.get("expert_weights_scale", float, 0.0) or 1.0,
            "experts.bias": file.has("ffn_down_exps.bias"),
            "experts.router_bias": file.has("ffn_gate_inp.bias"),
        }
        if shared:
            found["experts.shared_size"] = size("expert_shared_feed_forward_length", "ffn_up_shexp.weight")
            found["experts.shared_mix"] = "gate"
        return found

    return read
