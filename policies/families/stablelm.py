"""StableLM 2 and StableLM 3B: Llama with layer norms and a quarter of each head rotated."""

import dataclasses
from collections.abc import Iterator

from dsjax.config import ModelConfig
from policies.base import Entry, Policy, WeightMap
from policies.decoder import ATTENTION, EMBEDDINGS, IGNORED, LAYER, MLP, NORMS
from policies.families.cohere import head_norms
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.ops import Stack
from policies.rope_fields import Rope


@dataclasses.dataclass(frozen=True)
class _WithHeadNorms(WeightMap):
    """Norms of heads are a tensor a head (StableLM 2 12B), so how many there are follows from the config."""

    def _spelled(self, config: ModelConfig, names: set[str] | None) -> Iterator[Entry]:
        yield from super()._spelled(config, names)
        for part, heads in {"q": config.num_heads, "k": config.num_kv_heads}.items():
            tensors = (f"{LAYER}.self_attn.{part}_layernorm.norms.{head}.weight" for head in range(heads))
            yield Entry(f"layers.{{i}}.attention.{part}_norm.scale", tuple(tensors), Stack())


STABLELM = Policy(
    name="stablelm",
    model_types=("stablelm",),
    architecture="StableLmForCausalLM",
    weights=_WithHeadNorms((*EMBEDDINGS, *NORMS, *ATTENTION, *MLP), IGNORED),
    config=(
        # transformers would take 32 for an absent num_key_value_heads.
        *sizes(kv_heads=REQUIRED),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(),
        Rope(partial=0.25),
        Field("use_qkv_bias", "attention_bias", bool, False),
        Field("use_parallel_residual", ("parallel_block", "shared_norm"), bool, False),
        head_norms("qk_layernorm"),
    ),
    traits={"norm": "layer", "norm_bias": True},
)
