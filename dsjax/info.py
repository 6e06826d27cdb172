"""What `dsjax info` says of a checkpoint, from its headers alone: architecture, bytes by part, memory plan."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax import checkpoint, memory
from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError
from dsjax.memory import readable
from dsjax.params import Params, flatten
from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.session import limit_context
from dsjax.tokenizer import load_tokenizer
from policies.loading import Checkpoint, open_checkpoint
from policies.sources import hub
from policies.sources.gguf import GgufFile

PAGE_SIZE = 64  # tokens, the engine's default
_PARTS = ("embedding", "attention", "mlp", "norms", "head")


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


def stored_parts(source: Checkpoint) -> list[Stored]:
    """What a checkpoint holds, by part and format.

    Raises:
      CheckpointError: the checkpoint does not fit its config.
    """
    shapes = source.shapes()
    return _totals(
        (_part(step.leaves[0]), *source.stored(tensor), math.prod(shapes[tensor]))
        for step in source.weights.fit(source.config, shapes, source.origin)
        for tensor in step.tensors
    )


def saved_parts(tree: Params) -> list[Stored]:
    """What a folder that `dsjax.save` wrote holds, by part and format."""

    def one(path: str, leaf: Any) -> tuple[str, str, int, int]:
        kind = leaf.scheme.name if isinstance(leaf, QuantizedArray) else jnp.dtype(leaf.dtype).name
        nbytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(leaf))
        return _part(path), kind, nbytes, math.prod(leaf.shape)

    return _totals(one(path, leaf) for path, leaf in flatten(tree).items())


def _totals(pieces: Iterable[tuple[str, str, int, int]]) -> list[Stored]:
    """Part, format, bytes and parameters of each tensor, added up."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for part, kind, nbytes, parameters in pieces:
        before = totals.get((part, kind), (0, 0))
        totals[part, kind] = (before[0] + parameters, before[1] + nbytes)
    ordered = sorted(totals.items(), key=lambda item: (_PARTS.index(item[0][0]), item[0][1]))
    return [Stored(*key, *sizes) for key, sizes in ordered]


def _part(path: str) -> str:
    """The part of the model that a leaf belongs to, by its dotted path."""
    names = path.split(".")
    module = names[2] if names[0] == "layers" else names[0]
    if module.endswith("norm"):
        return "norms"
    if names[0] == "layers":
        return module
    return "head" if module in ("embed_out", "head", "pooler", "projection") else "embedding"


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
    folder = checkpoint.saved_folder(path)
    if folder is not None:
        source, tree = None, checkpoint.saved_shapes(folder)
        config, parts = tree.config, saved_parts(tree)
    else:
        source = open_checkpoint(path)
        config, parts = source.config, stored_parts(source)
    config = limit_context(config, max_model_len)
    return "\n".join(
        [
            str(path),
            *_architecture(config, source, path),
            "",
            *_weights(config, parts),
            "",
            *_plan(config, parts, dtype, quantize),
        ]
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _architecture(config: ModelConfig, source: Checkpoint | None, path: Path) -> Iterator[str]:
    c = config
    yield _line("architecture", f"{c.model_type}, {c.num_layers} layers, hidden {c.hidden_size:,}")
    yield _line("attention", f"{c.num_heads} query heads, {c.num_kv_heads} key/value heads of {c.head_dim}")
    if any(c.windows):
        windowed = [window for window in c.windows if window]
        yield _line("window", f"{windowed[0]:,} tokens in {len(windowed)} of {c.num_layers} layers")
    experts = f", {c.experts.count} experts, {c.experts.per_token} a token" if c.experts else ""
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


def _loaded_bytes(part: Stored, dtype: str, quantize: str | None) -> int:
    """What the weights of a part take when they are loaded."""
    if quantize in SCHEMES and part.part != "norms":
        return SCHEMES[quantize].nbytes((1, part.parameters))
    if quantize is None and part.kind.lower() in SCHEMES:
        return part.nbytes
    return part.parameters * jnp.dtype(dtype).itemsize


def _plan(config: ModelConfig, parts: list[Stored], dtype: str, quantize: str | None) -> Iterator[str]:
    name, total = memory.available()
    loaded = sum(_loaded_bytes(part, dtype, quantize) for part in parts)
    budget, token = int(total * memory.USABLE), memory.kv_bytes(config, dtype)
    pages = memory.pages_that_fit(budget, loaded, token * PAGE_SIZE)
    how = {None: "", "none": ", dequantized"}.get(quantize, f", quantized to {quantize}")
    yield _line("memory", f"{readable(total)} on {name}, of which {memory.USABLE:.0%} may be used")
    yield _line("weights", f"{readable(loaded)} in {dtype}{how}")
    yield _line("keys, values", f"{readable(token)} a token, {readable(token * PAGE_SIZE)} a page")
    if loaded > budget:
        yield _line("pages", "none: the weights alone do not fit")
    else:
        tokens = pages * PAGE_SIZE
        texts = tokens / config.max_context
        yield _line("pages", f"{pages:,} of {PAGE_SIZE} tokens: {tokens:,} tokens, {texts:,.1f} full contexts")
