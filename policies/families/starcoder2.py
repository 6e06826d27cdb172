"""StarCoder2: a plain feed-forward layer, layer norms, and biases everywhere."""

from policies.base import Policy, WeightMap, each
from policies.decoder import ALL_BIASES, ATTENTION, EMBEDDINGS, IGNORED, KINDS, LAYER, NORMS
from policies.fields import REQUIRED, ActivationField, Field, sizes
from policies.rope_fields import Rope
from policies.window_fields import Windows

STARCODER2 = Policy(
    name="starcoder2",
    model_types=("starcoder2",),
    architecture="Starcoder2ForCausalLM",
    weights=WeightMap(
        (
            *EMBEDDINGS,
            *NORMS,
            *ATTENTION,
            *each(KINDS, "layers.{i}.mlp.up", f"{LAYER}.mlp.c_fc"),
            *each(KINDS, "layers.{i}.mlp.down", f"{LAYER}.mlp.c_proj"),
        ),
        IGNORED,
    ),
    config=(
        # transformers would take 2 for an absent num_key_value_heads.
        *sizes(kv_heads=REQUIRED, tied=True),
        Field("norm_epsilon", "norm_eps", float, 1e-5),
        ActivationField(default="gelu_pytorch_tanh"),
        Rope(),
        Field("use_bias", (*ALL_BIASES, "mlp_bias"), bool, True),
        Windows(lists_types=False),
    ),
    traits={"norm": "layer", "norm_bias": True, "gated": False},
    # Left over from the training framework; transformers reads hidden_act and norm_epsilon instead of the first two.
    harmless=frozenset(
        {
            "activation_function",
            "layer_norm_epsilon",
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
            "embedding_dropout",
            "residual_dropout",
        }
    ),
    fixed={"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True},
)
