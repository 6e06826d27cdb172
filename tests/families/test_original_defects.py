"""What DeepSpeed's inference engines get wrong about architectures, and dsjax has to get right."""

import json

import jax.numpy as jnp
import pytest
import torch
import transformers
from family_harness import BASE

import dsjax
import policies

# Fields that hold the epsilon of norms, in one family or another.
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# These have none in their configs, or, as BioGPT, one that transformers itself does not use.
WITHOUT_EPSILON = ("biogpt", "distilbert", "olmo", "opt")
# What transformers' defaults leave open.
MORE = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}


def read(model_type, **fields):
    """A config of transformers' defaults at tiny sizes, as its file would say, with some fields changed."""
    raw = json.loads(transformers.AutoConfig.for_model(model_type, **fields).to_json_string())
    return policies.get(model_type).read_config(raw)


def test_gelu_is_the_one_that_the_config_names():
    """The second engine's kernels compute the tanh form, even for Falcon."""
    assert read("falcon").activation == "gelu"
    assert read("falcon", activation="gelu_pytorch_tanh").activation == "gelu_tanh"
    assert read("phi").activation == "gelu_tanh" and read("gpt_neox").activation == "gelu"


@pytest.mark.parametrize(
    "model_type", sorted(set(policies.supported()) & set(transformers.CONFIG_MAPPING) - set(WITHOUT_EPSILON))
)
def test_the_epsilon_of_norms_is_that_of_the_config(model_type):
    """The second engine takes 1e-5 for most families."""
    config = transformers.AutoConfig.for_model(model_type)
    (name,) = [name for name in EPSILONS if hasattr(config, name)]
    assert read(model_type, **MORE.get(model_type, {}), **{name: 0.003}).norm_eps == 0.003


def test_rotary_base_and_scaling_are_those_of_the_config():
    """Falcon's base is ignored there, and Llama's scaling."""
    assert read("falcon", rope_parameters={"rope_type": "default", "rope_theta": 777.0}).rope_theta == 777
    llama = read("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0})
    assert llama.rope_theta == 777 and llama.rope_scaling == dsjax.RopeScaling("linear", factor=2.0)


def test_sliding_windows_are_those_of_the_config():
    """Mistral's and Phi-3's are ignored there."""
    for model_type in ("mistral", "phi3"):
        assert set(read(model_type, sliding_window=77).windows) == {77}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen2Moe"])
def test_qwen2_runs_in_every_dtype(name, dtype, tmp_path):
    """They are forced to float16 there, in which Qwen2 overflows."""
    more = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(**BASE, **(more if name == "Qwen2Moe" else {}))
    getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    params = dsjax.load(tmp_path, dtype=dtype)
    assert {leaf.dtype for leaf in dsjax.params.flatten(params).values()} == {jnp.dtype(dtype)}
    assert jnp.isfinite(dsjax.logits(params, [[3, 4, 5]])).all()
