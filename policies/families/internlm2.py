"""InternLM2 and 2.5: Llama under other names, with q, k and v as one tensor, grouped by key head."""

from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import ALL_BIASES, KINDS
from policies.fields import ActivationField, Field, sizes
from policies.ops import Grouped
from policies.rope_fields import Rope

_LAYER = "model.layers.{i}"
_QKV = tuple(
    Entry(
        tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in "qkv"), f"{_LAYER}.attention.wqkv.{kind}", Grouped()
    )
    for kind in KINDS
)

INTERNLM2 = Policy(
    name="internlm2",
    model_types=("internlm2",),
    architecture="InternLM2ForCausalLM",
    weights=WeightMap(
        (
            Entry("embed.weight", "model.tok_embeddings.weight"),
            Entry("final_norm.scale", "model.norm.weight"),
            Entry("head.weight", "output.weight", redundant=True),
            Entry("layers.{i}.attention_norm.scale", f"{_LAYER}.attention_norm.weight"),
            Entry("layers.{i}.mlp_norm.scale", f"{_LAYER}.ffn_norm.weight"),
            *_QKV,
            *each(KINDS, "layers.{i}.attention.out", f"{_LAYER}.attention.wo"),
            Entry("layers.{i}.mlp.gate.weight", f"{_LAYER}.feed_forward.w1.weight"),
            Entry("layers.{i}.mlp.up.weight", f"{_LAYER}.feed_forward.w3.weight"),
            Entry("layers.{i}.mlp.down.weight", f"{_LAYER}.feed_forward.w2.weight"),
        )
    ),
    config=(
        *sizes(),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        ActivationField(),
        Rope(),
        Field("bias", ALL_BIASES, bool, True),
    ),
)
