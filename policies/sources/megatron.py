"""Megatron-LM's GPT checkpoints, a folder or file for each tensor-parallel rank, and Megatron-DeepSpeed's experts.

Dense ones compute what GPT-2 does, so that is what they are called here. The fused projection's rows are in one of
three orders, told by `checkpoint_version`: before 1 all of q, then k, then v; in 1 one row of each in turn; since 2 by
head. Experts of Megatron-DeepSpeed (arXiv 2201.05596) have files of their own beside those of the ranks.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import Activation, Experts, ModelConfig
from dsjax.errors import CheckpointError, ConfigError
from policies.base import Entry, Shape, WeightMap, each
from policies.ops import Alternating, Grouped, Join, Op, Stack
from policies.sources.files import FileTensor
from policies.sources.pieces import Pieces, by_name
from policies.sources.torch_file import TorchFile

_RANK = re.compile(r"mp_rank_(\d+)(_model_states\.pt)?")
_EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_(\d+)_model_states\.pt")
_ITERATION = "latest_checkpointed_iteration.txt"
_STATE_FILES = ("model_optim_rng.pt", "model_rng.pt")
# What stands before a tensor's name in one release or another.
_WRAPPERS = re.compile(r"^((model|module|language_model|encoder|transformer)\.)+")
_WEIGHT = re.compile(r"(embedding|layers|final_layernorm|output_layer)\b.*(weight|bias)")

_KINDS = ("weight", "bias")
_CUT_ROWS = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
_CUT_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
_CUT_COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")

# Arguments that change the mathematics, and the value that means "not used".
_FIXED: Mapping[str, Any] = {
    "swiglu": False,
    "normalization": "LayerNorm",
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": True,
    "add_position_embedding": True,
    "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False,
    "group_query_attention": False,
    "squared_relu": False,
}


def _norm(leaf: str, tensor: str) -> tuple[Entry, ...]:
    return Entry(f"{leaf}.scale", f"{tensor}.weight"), Entry(f"{leaf}.bias", f"{tensor}.bias")


def _weights(version: float) -> WeightMap:
    order: Op = Join() if version < 1 else Alternating() if version < 2 else Grouped()
    layer, expert = "layers.{i}", "layers.{i}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
    heads = [f"{layer}.attention.{part}" for part in "qkv"]
    networks = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
    return WeightMap(
        entries=(
            Entry("embed.weight", "embedding.word_embeddings.weight"),
            Entry("positions.weight", "embedding.position_embeddings.weight"),
            *_norm(f"{layer}.attention_norm", f"{layer}.input_layernorm"),
            *_norm(f"{layer}.mlp_norm", f"{layer}.post_attention_layernorm"),
            *_norm("final_norm", "final_layernorm"),
            *(
                Entry(tuple(f"{head}.{kind}" for head in heads), f"{layer}.attention.query_key_value.{kind}", order)
                for kind in _KINDS
            ),
            *each(_KINDS, f"{layer}.attention.out", f"{layer}.attention.dense"),
            *(
                entry
                for leaf, tensor in networks.items()
                for entry in (
                    *each(_KINDS, f"{layer}.mlp.{leaf}", f"{layer}.mlp.{tensor}"),
                    *each(_KINDS, f"{layer}.mlp.shared.{leaf}", f"{layer}.mlp.mlp.{tensor}"),
                    *each(_KINDS, f"{layer}.mlp.experts.{leaf}", f"{expert}.{tensor}", Stack()),
                )
            ),
            Entry(f"{layer}.mlp.router.weight", f"{layer}.mlp.deepspeed_moe.gate.wg.weight"),
            *each(_KINDS, f"{layer}.mlp.shared_gate", f"{layer}.mlp.coefficient"),
            Entry("head.weight", "output_layer.weight"),
        )
    )


class MegatronFolder(Pieces):
    """A checkpoint of Megatron-LM or Megatron-DeepSpeed; the ranks' pieces of a tensor are put together.

    Args:
      path: the folder with `mp_rank_00` in it, or the one above it that tells the latest iteration.

    Raises:
      CheckpointError: there is no such checkpoint.
    """

    def __init__(self, path: Path):
        self.path = _iteration(Path(path))

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder looks like Megatron's."""
        return (path / _ITERATION).is_file() or any(_RANK.fullmatch(entry.name) for entry in path.iterdir())

    @property
    def origin(self) -> str:
        """The path."""
        return str(self.path)

    @functools.cached_property
    def _files(self) -> list[list[TorchFile]]:
        """The files of each rank, its own state first."""
        ranks: dict[int, list[Path]] = {}
        for entry in sorted(self.path.iterdir()):
            if match := _RANK.fullmatch(entry.name):
                files = [entry] if match[2] else [entry / name for name in _STATE_FILES if (entry / name).is_file()]
                if not files:
                    raise CheckpointError(f"{entry}: holds none of {', '.join(_STATE_FILES)}")
                ranks.setdefault(int(match[1]), []).insert(0, files[0])
            elif match := _EXPERT_FILE.fullmatch(entry.name):
                ranks.setdefault(int(match[1]), []).append(entry)
        if sorted(ranks) != list(range(len(ranks))) or not ranks:
            raise CheckpointError(
                f"{self.path}: mp_rank_00 and those that follow it should be here, are: {sorted(ranks) or 'none'}; "
                "pipeline-parallel checkpoints have to be merged first"
            )
        return [[TorchFile(file) for file in ranks[rank]] for rank in range(len(ranks))]

    @functools.cached_property
    def pieces(self) -> dict[str, list[FileTensor]]:
        """The ranks' pieces of every tensor, by its name without the wrappers that releases put around it.

        Raises:
          CheckpointError: a file is missing or damaged, or the ranks do not hold pieces of the same tensors.
        """
        return by_name(
            self.origin, [dict(tensor for file in files for tensor in _tensors(file)) for files in self._files]
        )

    def cut_axis(self, name: str, piece: Shape) -> int | None:
        """See `Pieces.cut_axis`."""
        return 0 if name.endswith(_CUT_ROWS + _CUT_VOCABULARY) else 1 if name.endswith(_CUT_COLUMNS) else None

    def join(self, name: str, pieces: list[FileTensor], whole: np.ndarray, axis: int) -> None:
        """See `Pieces.join`."""
        if self._version < 1 and ".query_key_value." in name:
            # Each rank has its heads' q, then their k, then their v.
            thirds = whole.reshape(3, -1, *whole.shape[1:])
            for piece, part in zip(pieces, np.split(thirds, len(pieces), 1), strict=True):
                part[...] = piece.read().reshape(part.shape)
        else:
            super().join(name, pieces, whole, axis)

    @functools.cached_property
    def _state(self) -> dict[str, Any]:
        state = self._files[0][0].state
        return state if isinstance(state, dict) else {}

    @property
    def _version(self) -> float:
        version = self._state.get("checkpoint_version", 0)
        if not isinstance(version, int | float):
            raise ConfigError(f"{self.origin}: checkpoint_version={version!r} should be a number")
        return float(version)

    @property
    def weights(self) -> WeightMap:
        """The map from Megatron's tensor names to leaves, for this version's order of rows."""
        return _weights(self._version)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The configuration, from the arguments that Megatron saved and from the tensors.

        Raises:
          ConfigError: an argument is missing, malformed or asks for what is not supported.
          CheckpointError: a file can not be read, or there are no embeddings.
        """
        arguments = self._state.get("args")
        values = vars(arguments) if arguments is not None and hasattr(arguments, "__dict__") else None
        if not values:
            raise ConfigError(f"{self.origin}: the checkpoint holds no 'args', which tell the number of heads")
        for name, neutral in _FIXED.items():
            if values.get(name, neutral) not in (neutral, None):
                raise ConfigError(
                    f"{self.origin}: argument {name}={values[name]!r} is not supported; only {neutral!r} is"
                )

        def size(name: str) -> int:
            value = values.get(name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{self.origin}: argument {name}={value!r} should be a positive integer")
            return value

        shapes = self.shapes()
        for name in ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight"):
            if len(shapes.get(name, ())) != 2:
                raise CheckpointError(f"{self.origin}: tensor '{name}' is missing or not a matrix")
        hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_layers")
        if hidden % heads:
            raise ConfigError(f"{self.origin}: num_attention_heads={heads} does not divide hidden_size={hidden}")
        inner = size("ffn_hidden_size") if values.get("ffn_hidden_size") is not None else 4 * hidden
        experts = self._experts(values, shapes, layers, inner)
        positions = shapes["embedding.position_embeddings.weight"][0]
        return ModelConfig(
            model_type="gpt2" if experts is None else "megatron_moe",
            vocab_size=shapes["embedding.word_embeddings.weight"][0],
            hidden_size=hidden,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_context=positions,
            norm="layer",
            norm_eps=float(values.get("layernorm_epsilon") or 1e-5),
            norm_bias=True,
            learned_positions=positions,
            rotary_dim=0,
            attention_bias=True,
            attention_out_bias=True,
            activation=_activation(values),
            gated=False,
            mlp_bias=True,
            experts=experts,
            tie_embeddings="output_layer.weight" not in shapes,
        )

    def _experts(self, values: dict[str, Any], shapes: dict[str, Shape], layers: int, inner: int) -> Experts | None:
        gates = [f"layers.{i}.mlp.deepspeed_moe.gate.wg.weight" for i in range(min(layers, len(shapes)))]
        counts = {shapes[gate][0] for gate in gates if gate in shapes}
        if not counts:
            return None
        if len(counts) > 1:
            raise ConfigError(
                f"{self.origin}: layers have {sorted(counts)} experts; only one number for all is supported"
            )
        chosen = values.get("topk", 1)
        if chosen not in (1, 2):
            raise ConfigError(f"{self.origin}: argument topk={chosen!r} is not supported; 1 and 2 are")
        residual = any(".mlp.coefficient." in name for name in shapes)
        return Experts(
            count=counts.pop(),
            per_token=chosen,
            size=inner,
            layers=tuple(gate in shapes for gate in gates),
            # One expert keeps its probability among all, two share theirs (DeepSpeed's top1gating and top2gating).
            renormalize=chosen == 2,
            bias=True,
            shared_size=inner if residual else 0,
            shared_mix="coefficient",
        )


def _iteration(path: Path) -> Path:
    """The folder of the latest iteration."""
    if not (path / _ITERATION).is_file():
        return path
    told = (path / _ITERATION).read_text(encoding="utf-8").strip()
    folder = path / (told if told == "release" else f"iter_{told.zfill(7)}")
    if not (told == "release" or told.isdecimal()) or not folder.is_dir():
        raise CheckpointError(f"{path / _ITERATION}: tells iteration {told!r}, which is not there")
    return folder


def _tensors(file: TorchFile) -> list[tuple[str, FileTensor]]:
    """Weights by name without wrappers; what belongs to the optimizer is left out."""
    found = []
    for name, tensor in file.tensors().items():
        bare = _WRAPPERS.sub("", name).replace(".self_attention.", ".attention.")
        if _WEIGHT.fullmatch(bare):
            found.append((bare, tensor))
    return found


def _activation(values: dict[str, Any]) -> Activation:
    # Megatron's fused kernel and OpenAI's formula are the tanh form, its plain path is the exact one.
    fused = values.get("bias_gelu_fusion", True)
    return "gelu_tanh" if fused or values.get("openai_gelu") else "gelu"
