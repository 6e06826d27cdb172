"""What `dsjax info` says of a checkpoint, from its headers alone: architecture, bytes by part, memory plan."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp

from dsjax import memory
from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError
from dsjax.memory import readable
from dsjax.quantization import SCHEMES
from dsjax.session import limit_context
from dsjax.tokenizer import load_tokenizer
from policies.sources import hub
from policies.sources.gguf import GgufFile
from policies.sources.safetensors import HfFolder

_PARTS = ("embedding", "attention", "mlp", "norms", "head")
_SAFETENSORS_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Weights of one part of a model in one format of its file.

    Attributes:
      part: embedding, attention, mlp, norms or head.
      kind: the file's name of the format.
      parameters: how many weights.
      nbytes: what they take in the file.
    """

    part: str
    kind: str
    parameters: int
    nbytes: int


def stored_parts(source: GgufFile | HfFolder) -> list[Stored]:
    """What a checkpoint holds, by part and format.

    Raises:
      CheckpointError: the checkpoint does not fit its config.
    """
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for step in source.weights.fit(source.config, source.shapes(), source.origin):
        for tensor in step.tensors:
            if isinstance(source, GgufFile):
                info = source.tensors[tensor]
                kind, nbytes = info.kind.name, info.nbytes
            else:
                info = source.tensors[tensor]
                kind, nbytes = info.kind, math.prod(info.shape) * _SAFETENSORS_BYTES[info.kind]
            key = (_part(step.leaves[0]), kind)
            parameters, size = totals.get(key, (0, 0))
            totals[key] = (parameters + math.prod(info.shape), size + nbytes)
    ordered = sorted(totals.items(), key=lambda item: (_PARTS.index(item[0][0]), item[0][1]))
    return [Stored(*key, *sizes) for key, sizes in ordered]


def _part(path: str) -> str:
    """The part of the model that a leaf belongs to, by its dotted path."""
    names = path.split(".")
    module = names[2] if names[0] == "layers" else names[0]
    return "norms" if module.endswith("norm") else {"embed": "embedding"}.get(module, module)


def describe(model: str, *, dtype: str, quantize: str | None = None, max_model_len: int | None = None) -> str:
    """A checkpoint and how it would run here, as lines of text.

    Args:
      model: a hub id, a folder or a file.
      dtype: what to compute in.
      quantize: as for `dsjax.load`.
      max_model_len: longest sequence in tokens; `None` for the model's own limit.

    Raises:
      DsjaxError: the checkpoint can not be read, or `max_model_len` is beyond the model's limit.
    """
    path = hub.resolve(model)
    source = HfFolder(path) if path.is_dir() else GgufFile(path)
    config, parts = limit_context(source.config, max_model_len), stored_parts(source)
    return "\n".join(
        [
            str(path),
            *_architecture(config, source, path),
            "",
            *_weights(config, parts),
            "",
            *_plan(config, parts, dtype, quantize == "none"),
        ]
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _architecture(config: ModelConfig, source: GgufFile | HfFolder, path: Path) -> Iterator[str]:
    c = config
    yield _line("architecture", f"{c.model_type}, {c.num_layers} layers, hidden {c.hidden_size:,}")
    yield _line("attention", f"{c.num_heads} query heads, {c.num_kv_heads} key/value heads of {c.head_dim}")
    if any(c.windows):
        windowed = [window for window in c.windows if window]
        yield _line("window", f"{windowed[0]:,} tokens in {len(windowed)} of {c.num_layers} layers")
    experts = f", {c.num_experts} experts, {c.experts_per_token} a token" if c.num_experts else ""
    yield _line("feed-forward", f"{c.intermediate_size:,}, {c.activation}{experts}")
    yield _line("vocabulary", f"{c.vocab_size:,} tokens" + (", head tied to the embedding" if c.tie_embeddings else ""))
    yield _line("context", f"{c.max_context:,} tokens")
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError as error:
        yield _line("tokenizer", f"none: {error}")
    else:
        ends = (f"{i} {tokenizer.backend.id_to_token(i)}" for i in tokenizer.eos_ids)
        yield _line("end of text", ", ".join(ends) or "none")
        yield _line("chat template", "none" if tokenizer.chat_template is None else "yes")
    licence = source.metadata.get("general.license") if isinstance(source, GgufFile) else None
    if licence:
        yield _line("licence", str(licence))


def _weights(config: ModelConfig, parts: list[Stored]) -> Iterator[str]:
    yield f"  {'weights':<14}{'stored as':<10}{'parameters':>16}{'bytes':>12}"
    for part in parts:
        yield f"  {part.part:<14}{part.kind:<10}{part.parameters:>16,}{readable(part.nbytes):>12}"
    if config.tie_embeddings:
        yield f"  {'head':<14}the embedding"
    total = sum(part.parameters for part in parts), sum(part.nbytes for part in parts)
    yield f"  {'together':<24}{total[0]:>16,}{readable(total[1]):>12}"


def _plan(config: ModelConfig, parts: list[Stored], dtype: str, dequantized: bool) -> Iterator[str]:
    name, total = memory.available()
    itemsize = jnp.dtype(dtype).itemsize
    loaded = sum(
        part.parameters * itemsize if dequantized or part.kind.lower() not in SCHEMES else part.nbytes for part in parts
    )
    plan = memory.Plan(total, loaded, memory.kv_bytes(config, dtype))
    yield _line("memory", f"{readable(total)} on {name}, of which {memory.USABLE:.0%} may be used")
    yield _line("weights", f"{readable(loaded)} in {dtype}{', dequantized' if dequantized else ''}")
    yield _line("keys, values", f"{readable(plan.token)} a token, {readable(plan.token * plan.page_size)} a page")
    if loaded > total * memory.USABLE:
        yield _line("pages", "none: the weights alone do not fit")
    else:
        texts = plan.tokens / config.max_context
        yield _line(
            "pages", f"{plan.pages:,} of {plan.page_size} tokens: {plan.tokens:,} tokens, {texts:,.1f} full contexts"
        )
