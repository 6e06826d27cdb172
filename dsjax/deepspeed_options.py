"""DeepSpeed's inference options as a table: how each is spelled, what it asks for by itself, and what becomes of it.

Those of `deepspeed.init_inference` (`DeepSpeedInferenceConfig`) and of FastGen (`RaggedInferenceEngineConfig`). A value
that is not an option's default either has a meaning here, or would change results if it were ignored, which is an
error, or has no meaning, which is a warning.
"""

import dataclasses
import difflib
import json
import numbers
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dsjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of DeepSpeed's.

    Attributes:
      name: dotted path in the nested configuration.
      default: what it is when it is not given.
      kind: what values it takes; `"count"` is a whole number of at least 1, `"size"` of at least 0. `None` is always as
        if the option were not given.
      aliases: other dotted paths that mean the same.
      idle: further values that ask for nothing.
      unused: why a value that asks for something changes nothing here; empty if it does.
      refused: why such a value is an error; empty if it is none.
    """

    name: str
    default: Any = None
    kind: Literal["any", "bool", "count", "size", "text", "path", "object"] = "any"
    aliases: tuple[str, ...] = ()
    idle: tuple[Any, ...] = ()
    unused: str = ""
    refused: str = ""


_MESH = "the mesh is made of the first tp_size devices of this process's JAX"
_EXPERTS = "experts are spread by the same mesh as all else: each device holds a slice of every expert"
_CHECKPOINT = "the checkpoint's own configuration says so"
_ACTIVATIONS = "activations are rounded only by dsjax.load(model, quantize='int8_w8a8')"
_POLICY = (
    "an architecture is a weight map here (dsjax.policies), which keeps what is in a checkpoint and how it is split"
)
_LEAVES = "weights go to the devices one at a time as they are read, and the model never exists without them"

OPTIONS = (
    # What is loaded, and as what.
    Option("dtype"),
    Option("checkpoint", aliases=("checkpoint_config.checkpoint_dir",)),
    Option("base_dir", "", "path", aliases=("checkpoint_config.base_dir",)),
    Option("config", aliases=("args",)),
    Option("save_mp_checkpoint_path", None, "path", aliases=("checkpoint_config.save_mp_checkpoint_path",)),
    Option("quant.enabled", None, "bool"),
    Option("quant.weight.enabled", True, "bool"),
    Option("quant.weight.num_bits", None, "count"),
    Option("quant.weight.q_type", "symmetric", "text"),
    Option("quant.weight.q_groups", 1, "count", unused="the groups of q8_0, q4_0 and q4_1 are 32 weights each"),
    Option(
        "quant.weight.quantized_initialization",
        {},
        "object",
        aliases=("weight_quantization.quantized_initialization",),
    ),
    Option("quant.weight.post_init_quant", {}, "object", aliases=("weight_quantization.post_init_quant",)),
    Option("quant.activation.enabled", True, "bool"),
    Option("quant.activation.num_bits", 8, "count", unused=_ACTIVATIONS),
    Option("quant.activation.q_type", "symmetric", "text", unused=_ACTIVATIONS),
    Option("quant.activation.q_groups", 1, "count", unused=_ACTIVATIONS),
    Option("quant.qkv.enabled", True, "bool", refused="the projections of attention can not be left out"),
    Option("quantization.quantization_mode", None, "text", aliases=("quantization_mode",)),
    # Devices.
    Option("tensor_parallel.enabled", True, "bool"),
    Option("tensor_parallel.tp_size", 1, "count", aliases=("mp_size",)),
    Option("tensor_parallel.tp_grain_size", 64, "count", unused="an axis is split where the devices divide it evenly"),
    Option("tensor_parallel.mpu", aliases=("mpu",), unused=_MESH),
    Option("tensor_parallel.tp_group", unused=_MESH),
    Option("moe.enabled", True, "bool"),
    Option("moe.ep_size", 1, "count", aliases=("ep_size",), unused=_EXPERTS),
    Option("moe.ep_mp_group", aliases=("ep_mp_group",), unused=_EXPERTS),
    Option("moe.ep_group", aliases=("moe.expert_group", "ep_group", "expert_group"), unused=_EXPERTS),
    Option("moe.moe_experts", [1], aliases=("moe.num_experts", "moe_experts"), idle=(1,), unused=_CHECKPOINT),
    Option("moe.type", "standard", "text", aliases=("moe_type",), unused=_CHECKPOINT),
    Option("training_mp_size", 1, "count", unused="how many ranks wrote a checkpoint is read off its files"),
    # How it runs.
    Option("replace_with_kernel_inject", True, "bool", aliases=("kernel_inject",)),
    Option("use_triton", False, "bool"),
    Option("triton_autotune", False, "bool", unused="the kernels choose their tiles from shapes, not by trial"),
    Option("enable_cuda_graph", False, "bool", unused="XLA records CUDA graphs by itself on a GPU"),
    Option(
        "triangular_masking", True, "bool", aliases=("tm",), refused="whether a model is causal is its checkpoint's"
    ),
    Option("transposed_mode", False, "bool", unused="the layout of weights in memory is the loader's"),
    Option("return_tuple", True, "bool", unused="an engine returns requests' outputs, not those of blocks"),
    Option("injection_policy", aliases=("injection_dict",), idle=({},), refused=_POLICY),
    Option("injection_policy_tuple", idle=((),), refused=_POLICY),
    Option("replace_method", "auto", unused="it has none in DeepSpeed either"),
    Option("set_empty_params", False, "bool", unused=_LEAVES),
    Option("keep_module_on_host", False, "bool", unused=_LEAVES),
    Option("zero", {}, "object", idle=({"stage": 0},), unused="weights are not offloaded: they stay on the devices"),
    # Memory, and how much runs at once.
    Option("max_out_tokens", None, "count", aliases=("max_tokens", "state_manager.max_context")),
    Option("min_out_tokens", 1, "count", aliases=("min_tokens",)),
    Option("state_manager.max_tracked_sequences", None, "count"),
    Option("state_manager.max_ragged_batch_size", None, "count"),
    Option("state_manager.max_ragged_sequence_count", None, "count"),
    Option("state_manager.memory_config.mode", "reserve", "text"),
    Option("state_manager.memory_config.size", None, "size"),
    Option("state_manager.offload", False, "bool", refused="keys and values stay on the devices; give fewer pages"),
)
_GROUP_ALIASES = {"tp": "tensor_parallel", "ckpt_config": "checkpoint_config", "manager": "state_manager"}

_OPTION_OF = {spelling: option for option in OPTIONS for spelling in (option.name, *option.aliases)}
_SPELLINGS = (*_OPTION_OF, *(f"{alias}." for alias in _GROUP_ALIASES))
_GROUPS = {path.rpartition(".")[0] for path in _OPTION_OF} - {""}
_KINDS = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1),
    "size": ("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0),
    "text": ("a string", lambda value: isinstance(value, str)),
    "path": ("a path", lambda value: isinstance(value, str | os.PathLike)),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
    "any": ("anything", lambda value: True),
}


def _is_whole(value: Any) -> bool:
    # JSON has 1e9 for a number of bytes.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value % 1 == 0


def defaults() -> dict[str, Any]:
    """Every option's value when it is not given, nested as DeepSpeed nests them."""
    nested: dict[str, Any] = {}
    for option in OPTIONS:
        *groups, name = option.name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = json.loads(json.dumps(option.default))  # nobody changes the table's own
    return nested


def read_options(config: Mapping[str, Any] | str | os.PathLike[str] | None, loose: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option by its dotted name.

    Args:
      config: nested options, or the path of a JSON file that holds them.
      loose: further ones.

    Raises:
      ConfigError: an option is unknown, is given twice with different values, has a value that it can not have, or asks
        for what would change results and is not there.

    Warns:
      UserWarning: one for all options that ask for something that has no meaning here.
    """
    given: dict[str, Any] = {}
    for source in (_as_mapping(config), loose):
        for option, value in _flat(source):
            if given.setdefault(option.name, value) != value:
                raise ConfigError(
                    f"{option.name} is given twice, as {given[option.name]!r} and as {value!r}; leave one out"
                )
    unused = []
    for name, value in given.items():
        option = _OPTION_OF[name]
        if not (option.refused or option.unused) or value in (option.default, *option.idle):
            continue
        if option.refused:
            raise ConfigError(f"{name}={value!r} is not supported: {option.refused}")
        unused.append(f"{name}={value!r} ({option.unused})")
    if unused:
        warnings.warn(f"init_inference: no meaning here, and ignored: {'; '.join(unused)}", UserWarning, stacklevel=3)
    return {option.name: given.get(option.name, option.default) for option in OPTIONS}


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config is a {type(config).__name__}; give a dictionary or the path of a JSON file")
    return read_json_object(Path(config))


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of one object holds.

    Raises:
      ConfigError: it can not be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can not be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, not an object of options")
    return value


def _flat(given: Mapping[str, Any], group: str = "") -> Iterator[tuple[Option, Any]]:
    """Every option in nested ones, with its value."""
    for key, value in given.items():
        path = f"{group}{key}"
        path = _GROUP_ALIASES.get(path, path)
        if path not in _OPTION_OF and path not in _GROUPS:
            raise unknown(path, _SPELLINGS)
        if value is None:
            continue
        if path in _OPTION_OF:
            yield _OPTION_OF[path], _checked(path, value)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        elif isinstance(value, bool) and f"{path}.enabled" in _OPTION_OF:
            yield _OPTION_OF[f"{path}.enabled"], value
        else:
            raise ConfigError(f"{path}={value!r} should be an object of options")


def _checked(path: str, value: Any) -> Any:
    option = _OPTION_OF[path]
    words, fits = _KINDS[option.kind]
    if not fits(value):
        raise ConfigError(f"{path}={value!r} should be {words}")
    return int(value) if option.kind in ("count", "size") else value


def unknown(path: str, known: Iterable[str]) -> ConfigError:
    """The error for an option that is not there, with those that are spelled nearly so."""
    # By their last parts too, for who forgets the group.
    names = {name.rstrip("."): name.rstrip(".") for name in known}
    names |= {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(path, names, n=3) or difflib.get_close_matches(path.rpartition(".")[2], names, n=3)
    hint = f"; near ones: {', '.join(dict.fromkeys(names[name] for name in near))}" if near else ""
    return ConfigError(f"there is no option {path}{hint}")
