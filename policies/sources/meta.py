"""Meta's own llama folders: params.json beside consolidated.*.pth, one file for each device that Meta ran it on.

Query and key rows are in the order that rotates neighbours. Format and defaults:
https://github.com/meta-llama/llama-models/blob/main/models/llama3/args.py
"""

import functools
import re
from pathlib import Path
from typing import Any

from dsjax.config import ModelConfig, RopeScaling
from dsjax.errors import CheckpointError, ConfigError
from policies.base import Entry, Shape, WeightMap
from policies.ops import InterleavedRotary
from policies.sources.files import FileTensor, read_json
from policies.sources.pieces import Pieces, by_name
from policies.sources.torch_file import TorchFile

_PIECE = re.compile(r"consolidated\.(\d+)\.pth")
_WEIGHTS = WeightMap(
    entries=(
        Entry("embed.weight", "tok_embeddings.weight"),
        Entry("layers.{i}.attention_norm.scale", "layers.{i}.attention_norm.weight"),
        Entry("layers.{i}.mlp_norm.scale", "layers.{i}.ffn_norm.weight"),
        Entry("layers.{i}.attention.q.weight", "layers.{i}.attention.wq.weight", InterleavedRotary()),
        Entry("layers.{i}.attention.k.weight", "layers.{i}.attention.wk.weight", InterleavedRotary()),
        Entry("layers.{i}.attention.v.weight", "layers.{i}.attention.wv.weight"),
        Entry("layers.{i}.attention.out.weight", "layers.{i}.attention.wo.weight"),
        Entry("layers.{i}.mlp.gate.weight", "layers.{i}.feed_forward.w1.weight"),
        Entry("layers.{i}.mlp.up.weight", "layers.{i}.feed_forward.w3.weight"),
        Entry("layers.{i}.mlp.down.weight", "layers.{i}.feed_forward.w2.weight"),
        Entry("final_norm.scale", "norm.weight"),
        Entry("head.weight", "output.weight"),
    ),
    ignored=(r"rope\.freqs",),
)
# Along which axis a matrix was cut for tensor parallelism; vectors were not.
_CUT_ROWS = (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight", "output.weight")
_CUT_COLUMNS = (".wo.weight", ".w2.weight")

_HARMLESS = frozenset({"multiple_of", "ffn_dim_multiplier", "max_batch_size", "vocab_size"})
_LLAMA32_TEXT = ((2048, 16), (3072, 28))  # width and layers of 1B and 3B, whose params.json leaves the factor out


class MetaFolder(Pieces):
    """A checkpoint as Meta publishes llama; tensors are read one at a time, their pieces put together.

    Args:
      path: the folder.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def weights(self) -> WeightMap:
        """The map from Meta's tensor names to leaves."""
        return _WEIGHTS

    @functools.cached_property
    def pieces(self) -> dict[str, list[FileTensor]]:
        """The pieces of every tensor by name.

        Raises:
          CheckpointError: a file is missing or damaged, or the files do not hold pieces of the same tensors.
        """
        matches = [match for path in self.path.iterdir() if (match := _PIECE.fullmatch(path.name))]
        files = sorted(matches, key=lambda match: int(match[1]))
        if not files or [int(match[1]) for match in files] != list(range(len(files))):
            raise CheckpointError(
                f"{self.path}: consolidated.00.pth and those that follow it should be here, are: "
                + (", ".join(match[0] for match in files) or "none")
            )
        return by_name(self.origin, [TorchFile(self.path / match[0]).tensors() for match in files])

    def cut_axis(self, name: str, piece: Shape) -> int | None:
        """See `Pieces.cut_axis`."""
        if len(piece) != 2:
            return None
        if name == "tok_embeddings.weight":
            # Llama 1 and 2 cut the width, 3 the vocabulary.
            return 1 if piece[1] * len(self.pieces[name]) == self._params["dim"] else 0
        return 0 if name.endswith(_CUT_ROWS) else 1 if name.endswith(_CUT_COLUMNS) else None

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return read_json(self.path / "params.json")

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration: params.json, and from the tensors what it leaves open.

        Raises:
          ConfigError: a parameter is missing, malformed or unknown.
          CheckpointError: a file can not be read, or there is no embedding.
        """
        asked = set(_HARMLESS)

        def get(name: str, kind: type, default: Any = None) -> Any:
            asked.add(name)
            value = self._params.get(name)
            value = default if value is None else value
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind or (kind is not bool and value <= 0):
                raise ConfigError(f"{self.path / 'params.json'}: {name}={value!r} should be a positive {kind.__name__}")
            return value

        width, layers, heads = get("dim", int), get("n_layers", int), get("n_heads", int)
        if width % heads:
            raise ConfigError(f"{self.path / 'params.json'}: n_heads={heads} does not divide dim={width}")
        shapes = self.shapes()
        if layers > len(shapes):
            raise CheckpointError(f"{self.path}: should have {layers} layers, has {len(shapes)} tensors")
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if len(shapes.get(name, ())) != 2:
                raise CheckpointError(f"{self.path}: tensor '{name}' is missing or not a matrix")
        vocab, theta = shapes["tok_embeddings.weight"][0], get("rope_theta", float, 10000.0)
        eps, scaled = get("norm_eps", float, 1e-5), get("use_scaled_rope", bool, False)
        factor = get("rope_scaling_factor", float, 32.0 if (width, layers) in _LLAMA32_TEXT else 8.0)
        bos, ends = _special_tokens(vocab)
        config = ModelConfig(
            model_type="llama",
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=get("n_kv_heads", int, heads),
            head_dim=width // heads,
            max_context=get("max_seq_len", int, _context(theta, eps, scaled)),
            norm_eps=eps,
            rope_theta=theta,
            rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192) if scaled else None,
            tie_embeddings="output.weight" not in shapes,
            bos_id=bos,
            eos_ids=ends,
        )
        for name, value in self._params.items():
            if name not in asked and value is not None:
                raise ConfigError(
                    f"{self.path / 'params.json'}: {name}={value!r} is unknown and may change what the model computes; "
                    "remove it if it does not"
                )
        return config


def _context(theta: float, eps: float, scaled: bool) -> int:
    """Context length of the release that has these parameters: params.json does not tell it."""
    if scaled:
        return 131072  # 3.1 and later
    if theta >= 500000.0:
        return 8192 if theta < 1e6 else 16384  # 3, Code Llama
    return 2048 if eps < 5e-6 else 4096  # 1, 2


def _special_tokens(vocab: int) -> tuple[int | None, tuple[int, ...]]:
    """Ids that begin a text and end a generation, by the size of Meta's vocabularies."""
    if vocab == 128256:
        return 128000, (128001, 128008, 128009)  # end of text, of message, of turn
    return (1, (2,)) if vocab in (32000, 32016) else (None, ())
