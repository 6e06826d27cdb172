"""What the Llama-like families share in Hugging Face's spelling: tensor names and configuration fields."""

from collections.abc import Callable
from typing import Any

from dsjax.config import Activation, ModelConfig, RopeScaling
from dsjax.errors import ConfigError
from policies.base import Entry, WeightMap

_LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

DECODER_WEIGHTS = WeightMap(
    entries=(
        Entry("embed.weight", "model.embed_tokens.weight"),
        Entry("layers.{i}.attention_norm.scale", "model.layers.{i}.input_layernorm.weight"),
        Entry("layers.{i}.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
        Entry("layers.{i}.attention.q_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
        Entry("layers.{i}.attention.k_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
        *(
            Entry(f"layers.{{i}}.{leaf}.{kind}", f"model.layers.{{i}}.{tensor}.{kind}")
            for leaf, tensor in _LINEARS.items()
            for kind in ("weight", "bias")
        ),
        Entry("final_norm.scale", "model.norm.weight"),
        Entry("head.weight", "lm_head.weight", redundant=True),
    ),
    # Older checkpoints saved the rotary frequencies, which follow from the config.
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

DECODER_FIELDS = frozenset(
    """
    bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
    """.split()
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def field(raw: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """One field of a parsed config.json, checked.

    Args:
      raw: the parsed file.
      name: the field.
      kind: `int`, `float` (which takes an integer too) or `bool`.
      default: in place of an absent or null field; `None` makes it required.

    Raises:
      ConfigError: the field is missing or of another type.
    """
    value = raw.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"config field {name} is missing")
        return default
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config field {name}={value!r} should be of type {kind.__name__}")
    return kind(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Ids of an `eos_token_id` or `bos_token_id` field, which may be null, one or a list."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise ConfigError(f"token ids must be non-negative integers, got {value!r}")
    return ids


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from transformers' older fields or from `rope_parameters`."""
    given = [name for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    if len(given) == 2 and raw["rope_scaling"] != raw["rope_parameters"]:
        raise ConfigError("rope_scaling and rope_parameters are both given and differ; keep one of them")
    name = given[0] if given else "rope_parameters"
    values = raw.get(name) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"config field {name}={values!r} should be a dictionary")
    kind_name = "rope_type" if "rope_type" in values else "type"
    kind = values.get(kind_name, "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{name}.{kind_name}={kind} is not supported; default, linear and llama3 are")
    read = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
    read |= {"linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor"}}.get(kind, set())
    for key, value in values.items():
        neutral = value is None or (key == "partial_rotary_factor" and value == 1) or (key == "factor" and value == 1)
        if key not in read and not neutral:
            raise ConfigError(f"{name}.{key}={value!r} is not supported with {kind_name}={kind}")

    theta = field(values, "rope_theta", float, field(raw, "rope_theta", float, 10000.0))
    if kind == "linear":
        return theta, RopeScaling("linear", factor=field(values, "factor", float))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=field(values, "factor", float),
            low_freq_factor=field(values, "low_freq_factor", float),
            high_freq_factor=field(values, "high_freq_factor", float),
            original_context=field(
                values, "original_max_position_embeddings", int, field(raw, "max_position_embeddings", int)
            ),
        )
        return theta, scaling
    return theta, None


def decoder_config(
    raw: dict[str, Any],
    *,
    attention_bias: bool = False,
    attention_out_bias: bool = False,
    mlp_bias: bool = False,
    window: Callable[[int], int | None] | None = None,
    qk_norm: bool = False,
    num_experts: int = 0,
    experts_per_token: int = 0,
) -> ModelConfig:
    """The configuration that Llama-like families have in common.

    Args:
      raw: parsed config.json.
      attention_bias: q, k and v have biases in this family.
      attention_out_bias: the attention output has one.
      mlp_bias: the feed-forward projections have biases.
      window: sliding window of a layer by its index, for families that have one.
      qk_norm: heads of q and k are normed in this family.
      num_experts: experts of a layer, for families that have them.
      experts_per_token: how many of them a token is sent to.

    Raises:
      ConfigError: names the field that is missing, malformed or not supported.
    """
    activation = raw.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act={activation!r} is not supported; these are: {', '.join(_ACTIVATIONS)}")
    hidden, heads = field(raw, "hidden_size", int), field(raw, "num_attention_heads", int)
    layers = field(raw, "num_hidden_layers", int)
    if raw.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={hidden} and there is no head_dim")
    theta, scaling = _rope(raw)
    windows = tuple(window(i) for i in range(layers)) if window else ()
    bos_ids = token_ids(raw.get("bos_token_id"))
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=field(raw, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=field(raw, "intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=field(raw, "num_key_value_heads", int, heads),
        head_dim=field(raw, "head_dim", int, hidden // heads),
        max_context=field(raw, "max_position_embeddings", int),
        norm_eps=field(raw, "rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_ACTIVATIONS[activation],
        attention_bias=attention_bias,
        attention_out_bias=attention_out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_embeddings=field(raw, "tie_word_embeddings", bool, False),
        windows=windows if set(windows) != {None} else (),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=token_ids(raw.get("eos_token_id")),
    )


def decoder_fields(
    config: ModelConfig, architecture: str, *, qk_norm: bool = False, experts: bool = False
) -> dict[str, Any]:
    """The fields of config.json that Llama-like families have in common: the reverse of `decoder_config`.

    Rotary scaling is written in the older spelling, which transformers reads in versions 4 and 5.

    Args:
      config: the architecture.
      architecture: name of transformers' model class.
      qk_norm: this architecture norms the heads of q and k.
      experts: this architecture has experts.

    Raises:
      ConfigError: the config has rotary factors, which Hugging Face's format can not hold, or norms or experts that the
        architecture has not.
    """
    refuse(
        config,
        config.model_type,
        qk_norm=config.qk_norm and not qk_norm,
        num_experts=config.num_experts > 0 and not experts,
    )
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        if scaling.kind == "factors":
            raise ConfigError("rope_scaling of kind 'factors' (from a GGUF file) has no spelling in config.json")
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_context
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    eos = list(config.eos_ids)
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "hidden_act": activation,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
    }


def refuse(config: ModelConfig, family: str, **unsupported: bool) -> None:
    """Raise for what a family's config.json can not express.

    Raises:
      ConfigError: names the first of `unsupported` that is true.
    """
    for name, present in unsupported.items():
        if present:
            raise ConfigError(f"{name}={getattr(config, name)!r} has no spelling in a {family} config.json")
