"""Mixtures of experts: who goes where, and the product of each token with the weights of its experts."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.plan import MAX_PAIRS, Plan, plan_experts
from pallas_kernels.grouped_matmul.reference import ACTIVATIONS, activate
from pallas_kernels.grouped_matmul.routing import Routing, choose_experts
from pallas_kernels.grouped_matmul.weights import QuantizedExperts

__all__ = [
    "ACTIVATIONS",
    "MAX_PAIRS",
    "Plan",
    "QuantizedExperts",
    "Routing",
    "activate",
    "choose_experts",
    "grouped_matmul",
    "plan_experts",
]
