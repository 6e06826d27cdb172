"""The engine: requests over time, over the same device-side scheduler that `generate` runs."""

from dsjax.engine.contract import SchedulingError, SchedulingResult
from dsjax.engine.engine import Engine
from dsjax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from dsjax.engine.sampling_params import SamplingParams

__all__ = [
    "CompletionOutput",
    "Engine",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SchedulingError",
    "SchedulingResult",
]
