"""Which policy serves which `model_type`."""

import importlib
import pkgutil

from dsjax.errors import ConfigError
from policies import families
from policies.base import Policy
from policies.fields import model_config

_POLICIES: dict[str, Policy] = {}

# The smallest model there is: enough to find a weight map that contradicts itself when it is registered.
_SMALLEST = {
    "model_type": "smallest",
    "vocab_size": 1,
    "hidden_size": 2,
    "intermediate_size": 1,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 2,
    "max_context": 1,
}


def register(policy: Policy) -> None:
    """Make a model family loadable; a policy of the same name is replaced.

    Args:
      policy: the family.

    Raises:
      ConfigError: another policy serves one of its model types, or its weight map contradicts itself.
    """
    policy.weights.steps(model_config({**_SMALLEST, **policy.traits, **policy.example}))
    for model_type in policy.model_types:
        holder = _POLICIES.get(model_type)
        if holder is not None and holder.name != policy.name:
            raise ConfigError(f"model_type '{model_type}' is already served by the policy '{holder.name}'")
    for model_type in [held for held, holder in _POLICIES.items() if holder.name == policy.name]:
        del _POLICIES[model_type]
    _POLICIES.update(dict.fromkeys(policy.model_types, policy))


def get(model_type: str) -> Policy:
    """The policy that serves a `model_type` of config.json.

    Raises:
      ConfigError: none does; the message lists those supported.
    """
    if model_type not in _POLICIES:
        raise ConfigError(f"model_type '{model_type}' is not supported; supported are: {', '.join(supported())}")
    return _POLICIES[model_type]


def supported() -> tuple[str, ...]:
    """Every `model_type` that can be loaded."""
    return tuple(sorted(_POLICIES))


for _module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
    for _value in vars(importlib.import_module(_module.name)).values():
        if isinstance(_value, Policy):
            register(_value)
