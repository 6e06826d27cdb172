"""What keys of GGUF files mean: defaults are those of llama.cpp, and unknown ones are errors."""

import dataclasses
import math

import numpy as np
import pytest

from dsjax.config import RopeScaling
from dsjax.errors import CheckpointError, ConfigError
from policies.gguf_models import gguf_config

LAYER_NORMS = ("phi2", "gptneox", "falcon", "mpt", "bloom", "cohere2", "stablelm")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A file of which only the shapes are asked, and rotary factors."""

    extra: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    origin: str = "file"

    def shapes(self):
        return {"token_embd.weight": (37, 64)} | self.extra

    def read(self, name):
        return np.ones(self.extra[name], np.float32)


def config_of(architecture, keys=None, tensors=None):
    """The config of a small model with these keys."""
    norm = f"attention.layer_norm_{'epsilon' if architecture in LAYER_NORMS else 'rms_epsilon'}"
    known = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "context_length": 128, norm: 1e-5}
    known |= {"attention.head_count": 4} | (keys or {})
    metadata = {f"{architecture}.{key}": value for key, value in known.items()}
    return gguf_config(metadata | {"general.architecture": architecture}, Tensors(tensors or {}))


WINDOW = {"attention.sliding_window": 9}
HEADS_OF_4 = {"attention.key_length": 4, "attention.value_length": 4}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0}
SHARPER = 2 * (0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("gemma2", {"block_count": 4}, {"windows": (4096, None, 4096, None), "attention_soft_cap": 50.0}),
        ("gemma2", {}, {"logit_soft_cap": 30.0, "embed_scale": 8.0, "attention_scale": 0.25}),
        # The 27B models scale by the width, not by the size of a head.
        ("gemma2", HEADS_OF_4 | {"block_count": 46}, {"attention_scale": 0.25}),
        ("gemma3", HEADS_OF_4 | {"block_count": 62}, {"attention_scale": 0.25}),
        ("gemma3", HEADS_OF_4, {"attention_scale": 0.5}),
        ("gemma3", {}, {"windows": (), "local_rope_theta": 10000.0, "logit_soft_cap": None}),
        ("gemma3", WINDOW | {"block_count": 7}, {"windows": (9, 9, 9, 9, 9, None, 9)}),
        ("gemma3", WINDOW | {"attention.sliding_window_pattern": 2}, {"windows": (9, None)}),
        ("gemma3", WINDOW | {"attention.sliding_window_pattern": [False, True]}, {"windows": (None, 9)}),
        ("gemma3", WINDOW | {"rope.freq_base_swa": 500.0}, {"local_rope_theta": 500.0}),
        ("cohere2", WINDOW | {"block_count": 5, "logit_scale": 0.5}, {"windows": (9, 9, 9, None, 9)}),
        ("cohere2", {"logit_scale": 0.5}, {"windows": (), "unrotated_layers": (True, True)}),
        ("olmo2", {}, {"model_type": "olmo2", "windows": (), "local_rope_theta": None}),
        ("olmo2", WINDOW, {"model_type": "olmo3", "windows": (9, 9), "local_rope_theta": 10000.0}),
        ("gpt-oss", WINDOW | {"block_count": 3}, {"windows": (9, None, 9)}),
        ("phi3", {"attention.sliding_window": 0}, {"windows": ()}),
        ("granite", {}, {"embed_scale": 1.0, "residual_multiplier": 1.0, "attention_scale": None, "logit_scale": 1.0}),
        ("smollm3", {"block_count": 4}, {"unrotated_layers": (False, False, False, True)}),
        ("falcon", {"attention.head_count_kv": 1}, {"shared_norm": True, "activation": "gelu"}),
        # The tensors say it, whatever the key says.
        ("stablelm", {"use_parallel_residual": False}, {"parallel_block": True, "shared_norm": True}),
        ("llama", YARN, {"rope_scaling": RopeScaling("yarn", 4.0, original_context=128, attention_factor=SHARPER)}),
        ("llama", {"rope.freq_base": float(np.float32(1e6 / 3))}, {"rope_theta": 333333.34}),
        ("qwen3moe", {"expert_shared_feed_forward_length": 0}, {"experts": None}),
    ],
)
def test_keys(architecture, keys, expected):
    config = config_of(architecture, keys)
    for name, value in expected.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("mpt", {}, r"an mpt model without mpt\.attention\.max_alibi_bias is not supported"),
        ("gemma3", {"attention.scale": 0.5}, r"gemma3\.attention\.scale=0\.5 is not supported and may change"),
        ("gemma2", {"expert_count": 4}, r"gemma2\.expert_count=4 is not supported"),
        ("granite", {"rope.scaling.finetuned": False}, r"granite\.rope\.scaling\.finetuned=False is not supported"),
        ("gptneox", {}, r"gptneox\.use_parallel_residual is missing"),
        ("glm4", {"rope.dimension_sections": [1, 2, 3, 0]}, r"glm4\.rope\.dimension_sections=\[1, 2, 3, 0\]"),
        ("gemma3", WINDOW | {"attention.sliding_window_pattern": [True]}, "names 1 layers, the model has 2"),
        ("llama", {"expert_count": 4}, r"llama\.expert_used_count is missing"),
        (
            "qwen3moe",
            {"expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2},
            r"qwen3moe\.expert_gating_func=2 is not supported",
        ),
        ("bloom", {"rope.freq_base": 10000.0}, r"bloom\.rope\.freq_base=10000\.0 is not supported"),
        ("qwen2", {"rope.dimension_count": 8}, r"qwen2\.rope\.dimension_count=8 .*only the head size 16"),
        ("phi3", {"rope.scaling.type": "longrope"}, r"phi3\.rope\.scaling\.type=longrope is not supported"),
        ("llama", {"rope.scaling.type": "yarn"}, r"type=yarn is not supported without llama\.rope\.scaling\.factor"),
        ("phi2", {"attention.layer_norm_epsilon": True}, r"phi2\.attention\.layer_norm_epsilon is True"),
        ("jamba", {}, "'jamba' is not supported; supported are: llama, qwen2, qwen3, .*gpt-oss"),
    ],
)
def test_unsupported_keys_are_named(architecture, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_of(architecture, keys)


def test_rotary_factors_must_fit():
    tensors = {"rope_factors_short.weight": (8,), "rope_factors_long.weight": (7,)}
    with pytest.raises(CheckpointError, match=r"'rope_factors_long\.weight' has shape \[7\], but a head of 16 needs"):
        config_of("phi3", tensors=tensors)
    with pytest.raises(ConfigError, match=r"factor=2\.0 and 'rope_factors_short\.weight' are both given"):
        config_of("phi3", {"rope.scaling.factor": 2.0}, tensors)
