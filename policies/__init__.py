"""Checkpoints to `(config, params)` and back: weight maps of model families, and the sources that weights come from."""

from policies.base import Policy
from policies.loading import load, load_config
from policies.registry import get, register, supported

__all__ = ["Policy", "get", "load", "load_config", "register", "supported"]
