"""DeepSpeed's quantization options as a recipe for `dsjax.load`."""

import os
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint import saved_folder
from dsjax.errors import ConfigError
from dsjax.params import leaf_specs
from dsjax.quantization import Recipe, Scheme, scheme
from policies.loading import open_checkpoint

_SCHEMES = {(8, "symmetric"): "q8_0", (4, "symmetric"): "q4_0", (4, "asymmetric"): "q4_1"}  # by bits and kind
_MODES = {"wf6af16": {"layers.*": "fp6"}}
_GROUP = ("num_bits", "group_size", "group_dim", "symmetric")
# The options that ask for few bits, each by itself.
OPTIONS = (
    "quantization.quantization_mode",
    "quant.weight.num_bits",
    "quant.weight.quantized_initialization",
    "quant.weight.post_init_quant",
)


def recipe(options: Mapping[str, Any], source: Any, described: Any) -> Recipe | None:
    """How weights are to be stored.

    Args:
      options: by dotted name, as `read_options` gives them.
      source: what `dsjax.load` is to load; opened only if the options name modules.
      described: its config, where it is a dictionary.

    Raises:
      ConfigError: options contradict each other, or ask for what there is not.
    """
    asked = [name for name in OPTIONS if options[name]]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: each says how weights are stored; leave all but one out")
    if (mode := options["quantization.quantization_mode"]) is not None:
        if mode not in _MODES:
            raise ConfigError(f"quantization.quantization_mode={mode!r} is not supported; there is {', '.join(_MODES)}")
        return _MODES[mode]
    if group := options["quant.weight.quantized_initialization"]:
        return _scheme("quant.weight.quantized_initialization", group)
    if groups := options["quant.weight.post_init_quant"]:
        return _by_module(groups, source, described)
    enabled, bits, kind = options["quant.enabled"], options["quant.weight.num_bits"], options["quant.weight.q_type"]
    is_asked = bits is not None or kind != "symmetric" if enabled is None else enabled
    if not is_asked or not options["quant.weight.enabled"]:
        return None
    name = _SCHEMES.get((bits or 8, kind))
    if name is None:
        known = ", ".join(f"{bits} {kind} ({name})" for (bits, kind), name in _SCHEMES.items())
        raise ConfigError(f"quant.weight: {bits or 8} bits, q_type={kind!r} is not supported; there are {known}")
    return name


def _scheme(name: str, group: Any) -> Scheme:
    """A scheme from the fields that DeepSpeed has for a group of modules; asymmetric by default, as always there."""
    if not isinstance(group, Mapping) or set(group) - set(_GROUP):
        raise ConfigError(f"{name}={group!r} should be an object of {', '.join(_GROUP)}")
    bits, size = group.get("num_bits", 8), group.get("group_size", 32)
    if bits not in (4, 8) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"{name}: num_bits={bits!r} should be 4 or 8, and group_size={size!r} a number of weights")
    if group.get("group_dim", 1) not in (1, -1):
        raise ConfigError(f"{name}: group_dim={group['group_dim']!r} is not supported: groups are along rows, 1 or -1")
    return scheme(f"int{bits}", symmetric=bool(group.get("symmetric", False)), group_size=size)


def _by_module(groups: Mapping[str, Any], source: Any, described: Any) -> Recipe:
    """Leaves whose tensors have in their names what a group is for; the first group that does decides."""
    if isinstance(source, str | os.PathLike) and saved_folder(source) is not None:
        raise ConfigError(
            f"quant.weight.post_init_quant: {source} was saved by dsjax.save and is loaded as it is; quantize the "
            "checkpoint that it was made from"
        )
    checkpoint = open_checkpoint(source, described)
    names: dict[str, list[str]] = {}
    for step in checkpoint.weights.fit(checkpoint.config, checkpoint.shapes(), checkpoint.origin):
        for leaf in step.leaves:
            names.setdefault(leaf, []).extend(step.tensors)
    specs = leaf_specs(checkpoint.config)
    matrices = [leaf for leaf in names if leaf.endswith(".weight") and len(specs[leaf].shape) > 1]
    chosen: dict[str, Scheme] = {}
    for key, group in groups.items():
        to = _scheme(f"quant.weight.post_init_quant[{key!r}]", group)
        found = [leaf for leaf in matrices if any(key in name for name in names[leaf])]
        if not found:
            some = ", ".join(sorted({names[leaf][0] for leaf in matrices})[:4])
            raise ConfigError(f"quant.weight.post_init_quant: {key!r} is in no name of a matrix, such as {some}")
        for leaf in found:
            chosen.setdefault(leaf, to)
    return chosen
