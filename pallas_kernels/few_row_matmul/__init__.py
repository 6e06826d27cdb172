"""Product of a few rows with a weight, activation included: the linear layers of a decode step."""

from pallas_kernels.few_row_matmul.api import MAX_ROWS, few_row_matmul
from pallas_kernels.few_row_matmul.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "MAX_ROWS", "few_row_matmul"]
