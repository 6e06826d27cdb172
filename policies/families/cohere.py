"""Cohere's Command R: attention and feed-forward side by side behind one norm, rotated in neighbouring pairs."""

from policies.base import Policy
from policies.decoder import ALL_BIASES, DECODER_WEIGHTS
from policies.fields import ActivationField, Custom, Field, field, sizes
from policies.rope_fields import Rope


def head_norms(name: str) -> Custom:
    """The field that says whether each head of queries and keys has a norm of its own."""
    return Custom(
        (name,),
        lambda raw, known: {"qk_norm": "heads" if field(raw, name, bool, False) else None},
        lambda config: {name: config.qk_norm is not None},
    )


COHERE_FIELDS = (
    *sizes(tied=True),
    Field("layer_norm_eps", "norm_eps", float, 1e-5),
    ActivationField(),
    Field("attention_bias", ALL_BIASES, bool, False),
    Field("logit_scale", "logit_scale", float, 0.0625),
)
COHERE_TRAITS = {
    "norm": "layer",
    "parallel_block": True,
    "shared_norm": True,
    "rotary_interleaved": True,
}
# Where no program looks at them: limits of the service, and how the model was trained.
COHERE_HARMLESS = frozenset({"cache_implementation", "model_max_length", "use_parallel_embedding"})
COHERE_FIXED = {
    "layer_norm_bias": False,
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
}

COHERE = Policy(
    name="cohere",
    model_types=("cohere",),
    architecture="CohereForCausalLM",
    weights=DECODER_WEIGHTS,
    config=(
        *COHERE_FIELDS,
        Rope(theta=500000.0),
        head_norms("use_qk_norm"),
    ),
    traits=COHERE_TRAITS,
    harmless=COHERE_HARMLESS,
    fixed=COHERE_FIXED,
)
