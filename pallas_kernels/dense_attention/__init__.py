"""Attention of dense batches, differentiable: for log-probabilities of given text, training through them, encoders."""

from pallas_kernels.dense_attention.api import dense_attention

__all__ = ["dense_attention"]
