"""The two towers of CLIP (arXiv 2103.00020): a causal encoder of texts, and an encoder of squares of images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.config import ModelConfig, Patches
from policies.base import Entry, Policy, WeightMap
from policies.decoder import norm
from policies.encoder import HARMLESS, TRAITS, modules, sizes
from policies.fields import ActivationField, Custom, Field, field, token_ids
from policies.ops import Shape

_MODULES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_TRAITS = {**TRAITS, "rotary_dim": 0}
_HARMLESS = HARMLESS | {"dropout", "initializer_factor"}


def _read_projection(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {"projection_size": field(raw, "projection_dim", int, 512)}


def _write_projection(config: ModelConfig) -> dict[str, Any]:
    return {} if config.projection_size is None else {"projection_dim": config.projection_size}


# In the file of a tower without a projection too.
_PROJECTION = Custom(("projection_dim",), _read_projection, _write_projection)


def _layers(prefix: str) -> tuple[Entry, ...]:
    layer = prefix + "encoder.layers.{i}."
    return (
        *norm("layers.{i}.attention_norm", f"{layer}layer_norm1"),
        *modules(_MODULES, tensor=layer),
        *norm("layers.{i}.mlp_norm", f"{layer}layer_norm2"),
    )


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The tensor is a convolution over squares, `[D, C, p, p]`; the leaf has the values of a square in a row."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        return [self._shape(shape[0], config) for shape in leaf_shapes]

    def to_leaves(self, tensors: list[Any], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Any]:
        return [tensor.reshape(shape) for tensor, shape in zip(tensors, leaf_shapes, strict=True)]

    def to_tensors(self, leaves: list[Any], config: ModelConfig) -> list[Any]:
        return [leaf.reshape(self._shape(leaf.shape[0], config)) for leaf in leaves]

    def _shape(self, rows: int, config: ModelConfig) -> Shape:
        patches = config.patches or Patches(1, 1, 1)
        return rows, patches.channels, patches.size, patches.size


def _read_end(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """2 was written for years, and is not the token that ends texts: that one has the highest id."""
    ids = token_ids(raw.get("eos_token_id", 49407))
    begin = token_ids(raw.get("bos_token_id"))
    return {"bos_id": begin[0] if begin else None, "eos_ids": () if ids == (2,) else ids}


def _write_end(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_ids
    return {"bos_token_id": config.bos_id, "eos_token_id": 2 if not eos else eos[0] if len(eos) == 1 else list(eos)}


# Files of both towers leave out what equals the defaults of transformers' classes.
CLIP_TEXT = Policy(
    name="clip-text",
    model_types=("clip_text_model",),
    architecture="CLIPTextModelWithProjection",
    weights=WeightMap(
        (
            Entry("embed.weight", "text_model.embeddings.token_embedding.weight"),
            Entry("positions.weight", "text_model.embeddings.position_embedding.weight"),
            *_layers("text_model."),
            *norm("final_norm", "text_model.final_layer_norm"),
            Entry("projection.weight", "text_projection.weight"),
        ),
        ignored=(r"embeddings\.position_ids", r"vision_model\..*", r"visual_projection\.weight", "logit_scale"),
        prefix="text_model.",
        optional={"projection_size": "text_projection.weight"},
    ),
    config=(
        *sizes(
            defaults={
                "hidden_size": 512,
                "intermediate_size": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 8,
            }
        ),
        Field("vocab_size", "vocab_size", default=49408),
        Custom(("bos_token_id", "eos_token_id"), _read_end, _write_end),
        ActivationField(default="quick_gelu"),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        Field("max_position_embeddings", ("max_context", "learned_positions"), default=77),
        _PROJECTION,
    ),
    traits={**_TRAITS, "causal": True, "pooler": "end"},
    harmless=_HARMLESS,
    example={"learned_positions": 1, "projection_size": 1},
)


def _read_patches(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    patches = Patches(
        image_size=field(raw, "image_size", int, 224),
        size=field(raw, "patch_size", int, 32),
        channels=field(raw, "num_channels", int, 3),
    )
    places = patches.count + 1
    return {"patches": patches, "vocab_size": 0, "max_context": places, "learned_positions": places}


def _write_patches(config: ModelConfig) -> dict[str, Any]:
    patches = config.patches or Patches(1, 1, 1)
    return {"image_size": patches.image_size, "patch_size": patches.size, "num_channels": patches.channels}


CLIP_VISION = Policy(
    name="clip-vision",
    model_types=("clip_vision_model",),
    architecture="CLIPVisionModelWithProjection",
    weights=WeightMap(
        (
            Entry("patches.weight", "vision_model.embeddings.patch_embedding.weight", _Convolution()),
            Entry("patches.class_token", "vision_model.embeddings.class_embedding"),
            Entry("positions.weight", "vision_model.embeddings.position_embedding.weight"),
            *norm("embed_norm", "vision_model.pre_layrnorm"),  # its name in every checkpoint
            *_layers("vision_model."),
            *norm("final_norm", "vision_model.post_layernorm"),
            Entry("projection.weight", "visual_projection.weight"),
        ),
        ignored=(r"embeddings\.position_ids", r"text_model\..*", r"text_projection\.weight", "logit_scale"),
        prefix="vision_model.",
        optional={"projection_size": "visual_projection.weight"},
    ),
    config=(
        *sizes(
            defaults={
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
            }
        ),
        Custom(("image_size", "patch_size", "num_channels"), _read_patches, _write_patches),
        ActivationField(default="quick_gelu"),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        _PROJECTION,
    ),
    traits={**_TRAITS, "embed_norm": True},
    harmless=_HARMLESS | {"bos_token_id", "eos_token_id"},
    example={"patches": Patches(1, 1, 1), "learned_positions": 2, "projection_size": 1},
)
