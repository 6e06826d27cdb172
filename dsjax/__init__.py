"""DeepSpeed-Inference and FastGen as pure functions in JAX: load a checkpoint, generate from a parameter tree."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.checkpoint import restore as restore
    from dsjax.checkpoint import save as save
    from dsjax.config import Experts as Experts
    from dsjax.config import Latent as Latent
    from dsjax.config import ModelConfig as ModelConfig
    from dsjax.config import Patches as Patches
    from dsjax.config import RopeScaling as RopeScaling
    from dsjax.deepspeed import default_inference_config as default_inference_config
    from dsjax.deepspeed import init_inference as init_inference
    from dsjax.encoding import encode as encode
    from dsjax.encoding import encode_image as encode_image
    from dsjax.engine import CompletionOutput as CompletionOutput
    from dsjax.engine import Engine as Engine
    from dsjax.engine import Logprob as Logprob
    from dsjax.engine import RequestMetrics as RequestMetrics
    from dsjax.engine import RequestOutput as RequestOutput
    from dsjax.engine import SamplingParams as SamplingParams
    from dsjax.engine import SchedulingError as SchedulingError
    from dsjax.engine import SchedulingResult as SchedulingResult
    from dsjax.errors import CheckpointError as CheckpointError
    from dsjax.errors import ConfigError as ConfigError
    from dsjax.errors import DsjaxError as DsjaxError
    from dsjax.errors import EngineError as EngineError
    from dsjax.errors import ParameterError as ParameterError
    from dsjax.errors import QueueFullError as QueueFullError
    from dsjax.errors import RequestError as RequestError
    from dsjax.generation import Generation as Generation
    from dsjax.generation import generate as generate
    from dsjax.params import Params as Params
    from dsjax.params import abstract as abstract
    from dsjax.params import init as init
    from dsjax.params import prepare as prepare
    from dsjax.quantization import QuantizedArray as QuantizedArray
    from dsjax.ragged import KVPages as KVPages
    from dsjax.ragged import PageTable as PageTable
    from dsjax.ragged import RaggedBatch as RaggedBatch
    from dsjax.ragged.state import Finish as Finish
    from dsjax.scoring import logits as logits
    from dsjax.scoring import score as score
    from dsjax.streaming import StreamStep as StreamStep
    from dsjax.streaming import stream as stream
    from dsjax.tokenizer import Tokenizer as Tokenizer
    from dsjax.tokenizer import load_tokenizer as load_tokenizer
    from dsjax.transformer import forward as forward
    from policies import export_hf as export_hf
    from policies import load as load
    from policies import load_config as load_config
    from policies.trees import from_tree as from_tree

# Public names by the module that has them; loaded when first asked for, since `policies` imports from here too.
_CONTENTS = {
    "dsjax.checkpoint": ("restore", "save"),
    "dsjax.config": ("Experts", "Latent", "ModelConfig", "Patches", "RopeScaling"),
    "dsjax.deepspeed": ("default_inference_config", "init_inference"),
    "dsjax.encoding": ("encode", "encode_image"),
    "dsjax.engine": (
        "CompletionOutput",
        "Engine",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
        "SamplingParams",
        "SchedulingError",
        "SchedulingResult",
    ),
    "dsjax.errors": (
        "CheckpointError",
        "ConfigError",
        "DsjaxError",
        "EngineError",
        "ParameterError",
        "QueueFullError",
        "RequestError",
    ),
    "dsjax.generation": ("Generation", "generate"),
    "dsjax.params": ("Params", "abstract", "init", "prepare"),
    "dsjax.quantization": ("QuantizedArray", "quantize"),
    "dsjax.ragged": ("KVPages", "PageTable", "RaggedBatch"),
    "dsjax.ragged.state": ("Finish",),
    "dsjax.scoring": ("logits", "score"),
    "dsjax.streaming": ("StreamStep", "stream"),
    "dsjax.tokenizer": ("Tokenizer", "load_tokenizer"),
    "dsjax.transformer": ("forward",),
    "policies": ("export_hf", "load", "load_config"),
    "policies.trees": ("from_tree",),
}
_MODULE_OF = {name: module for module, names in _CONTENTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
