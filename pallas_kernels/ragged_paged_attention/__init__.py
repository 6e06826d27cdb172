"""Attention of a ragged batch of queries over paged keys and values."""

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cascade import SharedPrefix, cascade_attention, shared_prefixes

__all__ = ["SharedPrefix", "cascade_attention", "ragged_paged_attention", "shared_prefixes"]
