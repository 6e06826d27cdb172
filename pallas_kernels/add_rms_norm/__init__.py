"""Residual and RMS norm in one: the sum that a layer passes on, and the norm of it that the next product reads."""

from pallas_kernels.add_rms_norm.api import add_rms_norm

__all__ = ["add_rms_norm"]
