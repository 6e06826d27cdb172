"""Gemma: Llama with norms around 1, scaled embeddings and the tanh form of GELU."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import REQUIRED, ActivationField, Custom, Field, sizes
from policies.rope_fields import Rope

# The embedding's scale follows from its width; no field says it.
EMBED_SCALE = Custom((), lambda raw, known: {"embed_scale": known["hidden_size"] ** 0.5}, lambda config: {})
# What the three generations share. transformers would take sizes of a 7B model for absent fields.
GEMMA_FIELDS = (
    *sizes(kv_heads=REQUIRED, head_dim=REQUIRED, tied=True),
    EMBED_SCALE,
    Field("rms_norm_eps", "norm_eps", float, 1e-6),
    Field("attention_bias", ALL_BIASES, bool, False),
)
GEMMA_HARMLESS = frozenset({"cache_implementation"})
GEMMA_FIXED = {"use_bidirectional_attention": False}


@dataclasses.dataclass(frozen=True)
class _LegacyActivation(ActivationField):
    """The first release says `gelu` and means the tanh form."""

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """The activation."""
        return {"activation": "gelu_tanh"} if raw.get(self.name) == "gelu" else super().read(raw, known)


GEMMA = Policy(
    name="gemma",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(*GEMMA_FIELDS, _LegacyActivation(default="gelu_pytorch_tanh"), Rope()),
    traits={"norm_offset": 1.0},
    harmless=GEMMA_HARMLESS,
    # Releases of transformers disagree on whether this field or hidden_act counts; here both mean the same.
    fixed={**GEMMA_FIXED, "hidden_activation": "gelu_pytorch_tanh"},
)
