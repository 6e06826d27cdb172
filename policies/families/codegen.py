"""CodeGen: GPT-J with one projection for queries, values and keys, made in four parts side by side."""

from collections.abc import Mapping
from typing import Any

from dsjax.errors import ConfigError
from policies.base import Policy, each
from policies.families.gptj import GPTJ_CONFIG, GPTJ_FIXED, GPTJ_TRAITS
from policies.fields import Derived
from policies.gpt import BLOCK, HARMLESS, fused_qkv, gpt_weights
from policies.ops import Grouped

_PARTS = 4


def _kv_heads(raw: Mapping[str, Any], known: Mapping[str, Any]) -> int:
    heads = known["num_heads"]
    if heads % _PARTS:
        raise ConfigError(f"n_head={heads} is not divisible by {_PARTS}, in which CodeGen's projection is stored")
    return heads


CODEGEN = Policy(
    name="codegen",
    model_types=("codegen",),
    architecture="CodeGenForCausalLM",
    weights=gpt_weights(
        *fused_qkv(f"{BLOCK}.attn.qkv_proj", Grouped(groups=_PARTS), parts="qvk"),
        *each(("weight",), "layers.{i}.attention.out", f"{BLOCK}.attn.out_proj"),
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    config=(*GPTJ_CONFIG, Derived("num_kv_heads", _kv_heads)),
    traits=GPTJ_TRAITS,
    harmless=HARMLESS,
    fixed=GPTJ_FIXED,
)
