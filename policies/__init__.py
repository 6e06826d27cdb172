"""Checkpoints to `(config, params)` and back: weight maps of model families, and the sources that weights come from."""

from policies.base import Policy
from policies.export import export_hf
from policies.loading import load, load_config
from policies.registry import get, register, supported

__all__ = ["Policy", "export_hf", "get", "load", "load_config", "register", "supported"]
