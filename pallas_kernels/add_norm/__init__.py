"""Residual and norm in one: the sum that a layer passes on, and the norm of it that the next product reads."""

from pallas_kernels.add_norm.api import add_norm

__all__ = ["add_norm"]
