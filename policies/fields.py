"""Fields of a Hugging Face config.json and those of `ModelConfig`.

Each line of a policy's `config` turns one into the other, in both directions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from dsjax.config import Activation, Experts, Latent, ModelConfig, Patches
from dsjax.errors import ConfigError

# What a default may be: a value, or a function of the file's fields and of what was read from them so far.
Default = Any
REQUIRED: Any = object()

_NESTED = {"experts": Experts, "latent": Latent, "patches": Patches}


class Codec(Protocol):
    """Some fields of config.json as fields of `ModelConfig`, and back."""

    @property
    def fields(self) -> frozenset[str]:
        """Names in config.json that it reads."""
        ...

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelConfig` (`"experts.count"` for nested ones) from those of config.json and those known."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Fields of config.json."""
        ...


def model_config(known: Mapping[str, Any]) -> ModelConfig:
    """The configuration with these fields; `"experts.count"` is the field `count` of `experts`.

    Raises:
      ConfigError: the fields contradict each other.
    """
    flat = {name: value for name, value in known.items() if "." not in name}
    for group, kind in _NESTED.items():
        inner = {name.split(".")[1]: value for name, value in known.items() if name.startswith(f"{group}.")}
        if inner:
            flat[group] = kind(**inner)
    return ModelConfig(**flat)


def lookup(config: ModelConfig, name: str) -> Any:
    """A field of `ModelConfig`; of a nested one that is `None`, `None`."""
    value: Any = config
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def field(raw: Mapping[str, Any], name: str, kind: type, default: Any = REQUIRED) -> Any:
    """One field of a parsed config.json, checked.

    Args:
      raw: the parsed file.
      name: the field.
      kind: `int`, `float` (which takes an integer too), `bool`, `str`, `list` or `dict`.
      default: in place of an absent or null field.

    Raises:
      ConfigError: the field is missing and has no default, or is of another type.
    """
    value = raw.get(name)
    if value is None:
        if default is REQUIRED:
            raise ConfigError(f"config field {name} is missing")
        return default
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config field {name}={value!r} should be of type {kind.__name__}")
    return kind(value)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of config.json that is one of `ModelConfig`, or several that are always equal.

    Attributes:
      name: in config.json.
      into: in `ModelConfig`, `"num_heads"` or `"experts.count"`; several share the value.
      kind: its type.
      default: of an absent or null field.
      aliases: other names that transformers takes for it.
    """

    name: str
    into: str | tuple[str, ...]
    kind: type = int
    default: Default = REQUIRED
    aliases: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """Its name, and the other ones."""
        return frozenset({self.name, *self.aliases})

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """Its value, for each place.

        Raises:
          ConfigError: it is missing, of another type, or given under two names that differ.
        """
        name, *others = [name for name in (self.name, *self.aliases) if raw.get(name) is not None] or [self.name]
        for other in others:
            if raw[other] != raw[name]:
                raise ConfigError(
                    f"config fields {name}={raw[name]!r} and {other}={raw[other]!r} mean the same; keep one"
                )
        default = self.default
        if callable(default) and raw.get(name) is None:
            default = default(raw, known)
        value = field(raw, name, self.kind, default)
        return dict.fromkeys((self.into,) if isinstance(self.into, str) else self.into, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The value of the first place; nothing for a field of a group that the model lacks."""
        place = self.into if isinstance(self.into, str) else self.into[0]
        if "." in place and lookup(config, place.split(".")[0]) is None:
            return {}
        return {self.name: lookup(config, place)}


@dataclasses.dataclass(frozen=True)
class Nullable(Field):
    """A field that may be null, which means that the model lacks the feature; the default is of an absent one."""

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """Its value or `None`, for each place."""
        if self.name in raw and raw[self.name] is None:
            return dict.fromkeys((self.into,) if isinstance(self.into, str) else self.into)
        return super().read(raw, known)


@dataclasses.dataclass(frozen=True)
class Custom:
    """Fields that need code.

    Attributes:
      names: in config.json.
      reader: as `Codec.read`.
      writer: as `Codec.write`.
    """

    names: Iterable[str]
    reader: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    writer: Callable[[ModelConfig], dict[str, Any]]

    @property
    def fields(self) -> frozenset[str]:
        """Its names."""
        return frozenset(self.names)

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """What the reader gives."""
        return self.reader(raw, known)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What the writer gives."""
        return self.writer(config)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A field of `ModelConfig` that config.json does not hold, since in this family it follows from others.

    Attributes:
      into: in `ModelConfig`.
      value: from the file's fields and those known.
    """

    into: str
    value: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]

    @property
    def fields(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """What follows."""
        return {self.into: self.value(raw, known)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


# Hugging Face's names of activations; the first of each is the one that is written.
_ACTIVATIONS: dict[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
    "relu2": ("relu2",),
}


@dataclasses.dataclass(frozen=True)
class ActivationField:
    """The name of the activation.

    Attributes:
      name: of the field in config.json.
      default: of an absent field, in Hugging Face's spelling.
    """

    name: str = "hidden_act"
    default: str = "silu"

    @property
    def fields(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.name})

    def read(self, raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """The activation."""
        value = raw.get(self.name) or self.default
        for activation, names in _ACTIVATIONS.items():
            if value in names:
                return {"activation": activation}
        supported = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
        raise ConfigError(f"{self.name}={value!r} is not supported; these are: {supported}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Its first name."""
        return {self.name: _ACTIVATIONS.get(config.activation, (config.activation,))[0]}


def token_ids(value: Any) -> tuple[int, ...]:
    """Ids of an `eos_token_id` or `bos_token_id` field, which may be null, one or a list."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise ConfigError(f"token ids must be non-negative integers, got {value!r}")
    return ids


def _read_ids(raw: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    bos = token_ids(raw.get("bos_token_id"))
    return {"bos_id": bos[0] if bos else None, "eos_ids": token_ids(raw.get("eos_token_id"))}


def _write_ids(config: ModelConfig) -> dict[str, Any]:
    eos = list(config.eos_ids)
    ids = {"bos_token_id": config.bos_id, "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None)}
    # transformers' classes name the padding token of some one vocabulary where the file names none.
    return ids | {"pad_token_id": None}


TOKEN_IDS = Custom(("bos_token_id", "eos_token_id"), _read_ids, _write_ids)


def default_head_dim(raw: Mapping[str, Any], known: Mapping[str, Any]) -> int:
    """The size of a head where the file does not say: the hidden size over the number of heads."""
    hidden, heads = known["hidden_size"], known["num_heads"]
    if heads < 1 or hidden % heads:
        raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={hidden} and there is no head_dim")
    return hidden // heads


def sizes(
    *,
    kv_heads: Default = lambda raw, known: known["num_heads"],
    head_dim: Default = default_head_dim,
    intermediate: Default = REQUIRED,
    tied: bool = False,
) -> tuple[Codec, ...]:
    """What nearly every family has in Hugging Face's usual names.

    Args:
      kv_heads: default of `num_key_value_heads`.
      head_dim: default of `head_dim`.
      intermediate: default of `intermediate_size`.
      tied: default of `tie_word_embeddings`: that of transformers' class, since files leave out what equals it.
    """
    return (
        Field("model_type", "model_type", str),
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "hidden_size"),
        Field("intermediate_size", "intermediate_size", default=intermediate),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        Field("num_key_value_heads", "num_kv_heads", default=kv_heads),
        Field("head_dim", "head_dim", default=head_dim),
        Field("max_position_embeddings", "max_context"),
        Field("tie_word_embeddings", "tie_embeddings", bool, tied),
        TOKEN_IDS,
    )
