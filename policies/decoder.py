"""What the Llama-like families share: tensor names and fields of config.json."""

from policies.base import Entry, WeightMap, each
from policies.fields import ActivationField, Codec, Field, sizes
from policies.ops import Join
from policies.rope_fields import Rope

KINDS = ("weight", "bias")
LAYER = "model.layers.{i}"
# Older checkpoints saved the rotary frequencies, which follow from the config.
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def norm(leaf: str, tensor: str) -> tuple[Entry, ...]:
    """Entries of a norm, with a bias where the config has one."""
    return Entry(f"{leaf}.scale", f"{tensor}.weight"), Entry(f"{leaf}.bias", f"{tensor}.bias")


EMBEDDINGS = (
    Entry("embed.weight", "model.embed_tokens.weight"),
    *norm("final_norm", "model.norm"),
    Entry("head.weight", "lm_head.weight", redundant=True),
    Entry("head.bias", "lm_head.bias"),
)
NORMS = (
    *norm("layers.{i}.attention_norm", f"{LAYER}.input_layernorm"),
    *norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
)
ATTENTION = tuple(
    entry
    for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}.items()
    for entry in each(KINDS, f"layers.{{i}}.attention.{leaf}", f"{LAYER}.self_attn.{tensor}")
)
QK_NORMS = tuple(
    entry for part in "qk" for entry in norm(f"layers.{{i}}.attention.{part}_norm", f"{LAYER}.self_attn.{part}_norm")
)
MLP = tuple(
    entry
    for leaf in ("gate", "up", "down")
    for entry in each(KINDS, f"layers.{{i}}.mlp.{leaf}", f"{LAYER}.mlp.{leaf}_proj")
)

# Gate and up as one tensor.
FUSED_MLP = (
    Entry(("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"), f"{LAYER}.mlp.gate_up_proj.weight", Join()),
    *each(KINDS, "layers.{i}.mlp.down", f"{LAYER}.mlp.down_proj"),
)

DECODER_WEIGHTS = WeightMap((*EMBEDDINGS, *NORMS, *ATTENTION, *QK_NORMS, *MLP), IGNORED)

RMS_EPS = Field("rms_norm_eps", "norm_eps", float)
DECODER: tuple[Codec, ...] = (*sizes(), RMS_EPS, Rope(), ActivationField())
ALL_BIASES = ("attention_bias", "attention_out_bias")
