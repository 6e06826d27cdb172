"""GPT-NeoX and Pythia: attention and feed-forward side by side with a norm each, and part of each head rotated."""

from policies.base import Either, Entry, Policy, WeightMap, each
from policies.decoder import KINDS, norm
from policies.fields import ActivationField, Field
from policies.gpt import EQUAL_HEADS, HARMLESS, TRAITS, fused_qkv, gpt_sizes
from policies.ops import Grouped
from policies.rope_fields import Rope

_LAYER = "gpt_neox.layers.{i}"

GPT_NEOX = Policy(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    weights=WeightMap(
        entries=(
            Entry("embed.weight", "gpt_neox.embed_in.weight"),
            *norm("final_norm", "gpt_neox.final_layer_norm"),
            # Files and transformers' module (since 5) name the head differently.
            Either(
                tuple((Entry("head.weight", name, redundant=True),) for name in ("embed_out.weight", "lm_head.weight"))
            ),
            *norm("layers.{i}.attention_norm", f"{_LAYER}.input_layernorm"),
            *norm("layers.{i}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
            *fused_qkv(f"{_LAYER}.attention.query_key_value", Grouped()),
            *each(KINDS, "layers.{i}.attention.out", f"{_LAYER}.attention.dense"),
            *each(KINDS, "layers.{i}.mlp.up", f"{_LAYER}.mlp.dense_h_to_4h"),
            *each(KINDS, "layers.{i}.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        ),
        ignored=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
        prefix="gpt_neox.",
    ),
    config=(
        *gpt_sizes(hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", tied=False),
        EQUAL_HEADS,
        Field("max_position_embeddings", "max_context"),
        Field("intermediate_size", "intermediate_size"),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        ActivationField(default="gelu"),
        Rope(partial=0.25, theta_name="rotary_emb_base", partial_name="rotary_pct"),
        Field("use_parallel_residual", "parallel_block", bool, True),
        Field("attention_bias", ("attention_bias", "attention_out_bias"), bool, True),
    ),
    traits={**TRAITS, "mlp_bias": True},
    harmless=HARMLESS | {"attention_probs_dropout_prob"},
)
