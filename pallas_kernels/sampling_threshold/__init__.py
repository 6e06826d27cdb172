"""The lowest logit that top-k, top-p and min-p leave in each row."""

from pallas_kernels.sampling_threshold.api import sampling_threshold

__all__ = ["sampling_threshold"]
