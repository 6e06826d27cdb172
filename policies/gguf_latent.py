"""GGUF files of models with multi-head latent attention: DeepSeek-V2, V3 and those made like them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import ConfigError
from dsjax.quantization import QuantizedArray
from policies.base import Either, Entry
from policies.gguf_fields import Metadata, rope_scaling
from policies.gguf_maps import gguf_map
from policies.ops import Grouped, Leaf, Shape
from policies.rope_fields import yarn_mscale

_LEAF, _BLOCK = "layers.{i}.attention", "blk.{i}"


@dataclasses.dataclass(frozen=True)
class ByHead:
    """The tensor has an axis of heads before the leaf's rows.

    Attributes:
      transposed: each head's matrix is `[in, out]`. A quantized tensor is dequantized to turn it.
    """

    transposed: bool = False

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """`[heads, rows, columns]`, or `[heads, columns, rows]`."""
        ((rows, columns),) = leaf_shapes
        size = rows // config.num_heads
        return [(config.num_heads, columns, size) if self.transposed else (config.num_heads, size, columns)]

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """All heads' rows one below the other."""
        (tensor,) = tensors
        if self.transposed:
            if isinstance(tensor, QuantizedArray):
                tensor = np.asarray(tensor.dequantize())
            tensor = tensor.swapaxes(1, 2)
        return [jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), tensor)]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The rows by heads."""
        tensor = jax.tree.map(lambda part: part.reshape(config.num_heads, -1, part.shape[-1]), leaves[0])
        return [tensor.swapaxes(1, 2) if self.transposed else tensor]


GGUF_LATENT = gguf_map(
    qkv=(
        Either(
            (
                (
                    Entry(f"{_LEAF}.q_down.weight", f"{_BLOCK}.attn_q_a.weight"),
                    Entry(f"{_LEAF}.q_down_norm.scale", f"{_BLOCK}.attn_q_a_norm.weight"),
                    Entry(f"{_LEAF}.q.weight", f"{_BLOCK}.attn_q_b.weight"),
                ),
                (Entry(f"{_LEAF}.q.weight", f"{_BLOCK}.attn_q.weight"),),
            )
        ),
        Entry(f"{_LEAF}.kv_down.weight", f"{_BLOCK}.attn_kv_a_mqa.weight"),
        Entry(f"{_LEAF}.kv_down_norm.scale", f"{_BLOCK}.attn_kv_a_norm.weight"),
        # Files up to the spring of 2025 have one tensor, as Hugging Face has.
        Either(
            (
                (
                    Entry(f"{_LEAF}.k_up.weight", f"{_BLOCK}.attn_k_b.weight", ByHead(transposed=True)),
                    Entry(f"{_LEAF}.v_up.weight", f"{_BLOCK}.attn_v_b.weight", ByHead()),
                ),
                (Entry((f"{_LEAF}.k_up.weight", f"{_LEAF}.v_up.weight"), f"{_BLOCK}.attn_kv_b.weight", Grouped()),),
            )
        ),
    )
)


def latent_heads(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of heads and ranks; newer files describe the compressed heads first, and the others under further keys."""
    get = file.get
    get("attention.head_count_kv", int, 1)
    key = get("attention.key_length_mla", int, get("attention.key_length", int))
    rope_size = get("rope.dimension_count", int)
    if not 0 < rope_size < key:
        raise ConfigError(
            f"{file.origin}: {file.prefix}rope.dimension_count={rope_size} is not part of a head of {key}"
        )
    return {
        "head_dim": key,
        "num_kv_heads": known["num_heads"],
        "latent.kv_rank": get("attention.kv_lora_rank", int),
        "latent.query_rank": get("attention.q_lora_rank", int, 0) or None,
        "latent.rope_size": rope_size,
        "latent.nope_size": key - rope_size,
        "latent.value_size": get("attention.value_length_mla", int, get("attention.value_length", int)),
    }


def latent_rotary(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base and scaling; yarn scales attention scores, of the part that is not rotated too."""
    scaling = rope_scaling(file, known["latent.rope_size"], known["max_context"])
    found: dict[str, Any] = {"rope_theta": file.get("rope.freq_base", float, 10000.0), "rope_scaling": scaling}
    # A tenth of config.json's mscale_all_dim; its mscale, which no key holds, is equal in all models.
    all_dim = round(file.get("rope.scaling.yarn_log_multiplier", float, 0.0) * 10, 9)
    if scaling is not None and scaling.kind == "yarn" and all_dim:
        found["rope_scaling"] = dataclasses.replace(scaling, attention_factor=1.0)
        found["attention_scale"] = known["head_dim"] ** -0.5 * yarn_mscale(scaling.factor, all_dim) ** 2
    return found


def latent_experts(file: Metadata, known: Mapping[str, Any]) -> dict[str, Any]:
    """Experts as DeepSeek has them; those of V3 are known by the correction of their scores.

    Files of the first months do not say that experts are in groups; as in llama.cpp, they are in one then.
    """
    get, layers = file.get, known["num_layers"]
    dense = get("leading_dense_block_count", int, 0)
    correction = f"blk.{dense}.exp_probs_b.bias" in file.tensors
    gating, size = get("expert_gating_func", int, 1), get("expert_feed_forward_length", int)
    if gating not in (1, 2):
        raise ConfigError(f"{file.origin}: {file.prefix}expert_gating_func={gating} is not supported; 1 and 2 are")
    return {
        "model_type": "deepseek_v3" if correction else "deepseek_v2",
        "experts.count": get("expert_count", int),
        "experts.per_token": get("expert_used_count", int),
        "experts.size": size,
        "experts.layers": tuple(i >= dense for i in range(layers)) if dense else (),
        "experts.score": "sigmoid" if gating == 2 else "softmax",
        "experts.correction": correction,
        "experts.renormalize": get("expert_weights_norm", bool, False),
        "experts.scale": get("expert_weights_scale", float, 0.0) or 1.0,
        "experts.groups": get("expert_group_count", int, 0) or 1,
        "experts.groups_per_token": get("expert_group_used_count", int, 0) or 1,
        "experts.group_score": "top2" if correction else "max",
        "experts.shared_size": get("expert_shared_count", int, 0) * size,
    }
