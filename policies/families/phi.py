"""Phi-1, 1.5 and 2: attention and feed-forward side by side behind one norm, biases everywhere, part rotation."""

from policies.base import Entry, Policy, WeightMap, each
from policies.decoder import KINDS, LAYER, norm
from policies.fields import ActivationField, Custom, Field, field, sizes
from policies.gpt import BIASES, HARMLESS, TRAITS
from policies.rope_fields import Rope

PHI = Policy(
    name="phi",
    model_types=("phi",),
    architecture="PhiForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "model.embed_tokens.weight"),
            *norm("final_norm", "model.final_layernorm"),
            Entry("head.weight", "lm_head.weight", redundant=True),
            Entry("head.bias", "lm_head.bias"),
            *norm("layers.{i}.attention_norm", f"{LAYER}.input_layernorm"),
            *(
                entry
                for leaf, tensor in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "dense"}.items()
                for entry in each(KINDS, f"layers.{{i}}.attention.{leaf}", f"{LAYER}.self_attn.{tensor}")
            ),
            *norm("layers.{i}.attention.q_norm", f"{LAYER}.self_attn.q_layernorm"),
            *norm("layers.{i}.attention.k_norm", f"{LAYER}.self_attn.k_layernorm"),
            *each(KINDS, "layers.{i}.mlp.up", f"{LAYER}.mlp.fc1"),
            *each(KINDS, "layers.{i}.mlp.down", f"{LAYER}.mlp.fc2"),
        ),
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ),
    config=(
        *sizes(),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(default="gelu_new"),
        Rope(partial=0.5),
        Custom(
            ("qk_layernorm",),
            lambda raw, known: (
                {"qk_norm": "head", "qk_norm_bias": True} if field(raw, "qk_layernorm", bool, False) else {}
            ),
            lambda config: {"qk_layernorm": config.qk_norm == "head"},
        ),
    ),
    traits={**TRAITS, **dict.fromkeys((*BIASES, "head_bias", "parallel_block", "shared_norm"), True)},
    harmless=HARMLESS,
)
