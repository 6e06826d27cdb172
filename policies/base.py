"""The mapping language: which checkpoint tensors fill which leaves, checked before any weight is read, and reversible.

A family is a `Policy`: how its configuration reads, and a `WeightMap` of entries between leaves and tensors. An entry
names one or several of each and the operation between them, so a fused or stacked tensor is a new `Op`, not new code
elsewhere.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import Params, flatten, is_fused, leaf_specs, validate
from dsjax.quantization import QuantizedArray

Shape = tuple[int, ...]
Leaf = np.ndarray | QuantizedArray | Any

# Fields that any Hugging Face config.json may hold and that do not change what the model computes at inference:
# provenance, storage, training, and the generation settings that older releases kept there.
HARMLESS_FIELDS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout attn_implementation
    attn_pdrop bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)

# Fields that are fine at the value which means "not used" and change the mathematics at any other.
FIXED_FIELDS: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}


@runtime_checkable
class Op(Protocol):
    """A reversible operation between checkpoint tensors and leaves; quantized leaves pass through it whole."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """Shapes that the tensors must have for leaves of these shapes."""
        ...

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Leaves from tensors."""
        ...

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Tensors from leaves: the inverse of `to_leaves`."""
        ...


@dataclasses.dataclass(frozen=True)
class Copy:
    """The leaf is the tensor."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The same shapes."""
        return leaf_shapes

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The same arrays."""
        return tensors

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The same arrays."""
        return leaves


@dataclasses.dataclass(frozen=True)
class InterleavedRotary:
    """llama.cpp's row order of query and key projections, where the two halves of a rotary pair are neighbours.

    dsjax, as Hugging Face, rotates row `j` of a head with row `j + head_dim / 2`. llama.cpp rotates row `2j` with row
    `2j + 1`. With `head_dim = 6`, leaf rows 0 1 2 3 4 5 are tensor rows 0 2 4 1 3 5. Rows stay whole, so blocks of
    quantized weights do too.
    """

    def _rows(self, count: int, config: ModelConfig) -> np.ndarray:
        return np.arange(count).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The same shapes."""
        return leaf_shapes

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Rows in rotate-half order."""
        return [tensor[self._rows(tensor.shape[0], config)] for tensor in tensors]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """Rows in interleaved order."""
        return [leaf[np.argsort(self._rows(leaf.shape[0], config))] for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The leaf is the tensors, one behind the other along a new first axis."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The shape of one, as often as the first axis is long."""
        (shape,) = leaf_shapes
        return [shape[1:]] * shape[0]

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """The stack."""
        return [jax.tree.map(lambda *parts: np.stack(parts), *tensors)]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """What is stacked."""
        (leaf,) = leaves
        return [leaf[i] for i in range(leaf.shape[0])]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a weight map; `{i}` in the names stands for every layer, `{e}` in a tensor's for every expert.

    Attributes:
      leaves: dotted path of the leaf, or several for an operation that fills them together.
      tensors: name of the checkpoint tensor, or several.
      op: what turns the tensors into the leaves.
      redundant: the tensor may be in the file although this config has no such leaf, and is then ignored (a head saved
        beside the embedding that it is tied to).
    """

    leaves: str | tuple[str, ...]
    tensors: str | tuple[str, ...]
    op: Op = Copy()
    redundant: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """An entry with its layer and experts filled in."""

    leaves: tuple[str, ...]
    tensors: tuple[str, ...]
    op: Op
    redundant: bool


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint that hands out one tensor at a time, on the host."""

    @property
    def origin(self) -> str:
        """Where it comes from, for messages."""
        ...

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name, from headers alone."""
        ...

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One tensor in memory of its own, as the file stores it."""
        ...


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Entries between leaves and checkpoint tensors, and patterns (regular expressions) of tensors to ignore."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def steps(self, config: ModelConfig) -> list[Step]:
        """The entries of this config, layer by layer; those of leaves that it lacks (a bias, a tied head) come too.

        Raises:
          ConfigError: two entries fill one leaf or use one tensor, an entry fills a leaf that no config has, or a leaf
            of this config is filled by none.
        """
        everything = dataclasses.replace(
            config,
            attention_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            qk_norm=True,
            tie_embeddings=False,
            num_experts=0,
            experts_per_token=0,
        )
        experts = dataclasses.replace(everything, mlp_bias=False, num_experts=1, experts_per_token=1)
        possible = leaf_specs(everything).keys() | leaf_specs(experts).keys()
        steps, filled, used = [], set(), set()
        for entry in self.entries:
            leaves = (entry.leaves,) if isinstance(entry.leaves, str) else entry.leaves
            tensors = (entry.tensors,) if isinstance(entry.tensors, str) else entry.tensors
            for i in range(config.num_layers if "{i}" in leaves[0] else 1):
                step = Step(
                    _at_layer(leaves, i),
                    _of_experts(_at_layer(tensors, i), config.num_experts),
                    entry.op,
                    entry.redundant,
                )
                for leaf in step.leaves:
                    if leaf not in possible:
                        raise ConfigError(f"the weight map fills leaf '{leaf}', which no model has")
                    if leaf in filled:
                        raise ConfigError(f"two entries of the weight map fill leaf '{leaf}'")
                    filled.add(leaf)
                for tensor in step.tensors:
                    if tensor in used:
                        raise ConfigError(f"two entries of the weight map use tensor '{tensor}'")
                    used.add(tensor)
                steps.append(step)
        for leaf in leaf_specs(config):
            if leaf not in filled:
                raise ConfigError(f"no entry of the weight map fills leaf '{leaf}'")
        return steps

    def fit(self, config: ModelConfig, shapes: Mapping[str, Shape], origin: str) -> list[Step]:
        """The steps that fill a model of `config` from tensors of these shapes.

        Args:
          config: the architecture.
          shapes: shape of every tensor in the checkpoint by name.
          origin: where the checkpoint comes from, for messages.

        Raises:
          CheckpointError: names the first tensor that is missing, of a wrong shape, or neither used nor ignored, with
            its leaf, and counts the others.
        """
        steps = self.steps(config)
        problems = list(self._misfits(steps, config, shapes))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{origin}: {problems[0]}{more}")
        specs = leaf_specs(config)
        return [step for step in steps if step.leaves[0] in specs]

    def _misfits(self, steps: list[Step], config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[str]:
        specs = leaf_specs(config)
        unused = set(shapes)
        for step in steps:
            if step.leaves[0] not in specs:
                if step.redundant:
                    unused.difference_update(step.tensors)
                continue
            leaf_shapes = [specs[leaf].shape for leaf in step.leaves]
            for tensor, expected in zip(step.tensors, step.op.tensor_shapes(leaf_shapes, config), strict=True):
                unused.discard(tensor)
                leaf = "', '".join(step.leaves)
                if tensor not in shapes:
                    yield f"leaf '{leaf}' needs tensor '{tensor}' of shape {list(expected)}, which the file lacks"
                elif tuple(shapes[tensor]) != tuple(expected):
                    yield (
                        f"tensor '{tensor}' has shape {list(shapes[tensor])}, but leaf '{leaf}' of this config "
                        f"needs {list(expected)}"
                    )
        ignored = [re.compile(pattern) for pattern in self.ignored]
        for tensor in sorted(unused):
            if not any(pattern.fullmatch(tensor) for pattern in ignored):
                yield f"tensor '{tensor}' {list(shapes[tensor])} has no place in a {config.model_type} of this config"


def _at_layer(names: Iterable[str], layer: int) -> tuple[str, ...]:
    return tuple(name.replace("{i}", str(layer)) for name in names)


def _of_experts(names: Iterable[str], count: int) -> tuple[str, ...]:
    return tuple(name.replace("{e}", str(expert)) for name in names for expert in range(count if "{e}" in name else 1))


def read_leaves(steps: list[Step], config: ModelConfig, source: TensorSource) -> Iterator[tuple[str, Leaf]]:
    """Leaves by dotted path, one step at a time, in the dtype that the source stores.

    Args:
      steps: what `WeightMap.fit` returned for this config and source.
      config: the architecture.
      source: the checkpoint; tensors are read as the iterator advances.
    """
    for step in steps:
        # Arrays live in the inner generator's frame only, so one step's are gone before the next step's are read.
        yield from _read_step(step, config, source)


def _read_step(step: Step, config: ModelConfig, source: TensorSource) -> Iterator[tuple[str, Leaf]]:
    leaves = step.op.to_leaves([source.read(name) for name in step.tensors], config)
    yield from zip(step.leaves, leaves, strict=True)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model family as data: how its configuration reads and writes, and where its weights go.

    Attributes:
      name: of the policy, for messages.
      model_types: values of `model_type` in config.json that it serves.
      weights: the map between leaves and the tensors of a Hugging Face checkpoint.
      config_from_hf: the parsed config.json as a `ModelConfig`; every field has been checked before.
      config_to_hf: its inverse; raises `ConfigError` for what the family can not express.
      fields: names that `config_from_hf` consumes.
      harmless: further names that do not change what the model computes.
      fixed: further names that must hold the given value.
      traits: fields of `ModelConfig` that make a config one of this family, for checking the map when it is registered.
    """

    name: str
    model_types: tuple[str, ...]
    weights: WeightMap
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    fields: frozenset[str]
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read_config(self, raw: dict[str, Any]) -> ModelConfig:
        """Configuration from a parsed config.json.

        Raises:
          ConfigError: names a field that is unknown, missing, or asks for mathematics that is not supported.
        """
        if raw.get("quantization_config") is not None:
            method = raw["quantization_config"].get("quant_method", "?")
            raise ConfigError(
                f"quantization_config.quant_method={method}: pre-quantized Hugging Face checkpoints are not read yet; "
                "load the unquantized checkpoint or a GGUF file"
            )
        fixed = {**FIXED_FIELDS, **self.fixed}
        for name, value in raw.items():
            if value is None or name in self.fields or name in self.harmless or name in HARMLESS_FIELDS:
                continue
            if name not in fixed:
                raise ConfigError(
                    f"config field {name}={value!r} is unknown to the {self.name} policy and may change what the "
                    "model computes; remove it if it does not"
                )
            if value != fixed[name]:
                raise ConfigError(f"config field {name}={value!r} is not supported; only {fixed[name]!r} is")
        return self.config_from_hf(raw)


def write_tensors(params: Params, policy: Policy) -> Iterator[tuple[str, Leaf]]:
    """Checkpoint tensors of a parameter tree as `(name, array)`: the reverse of loading.

    Args:
      params: a tree as loaded, not fused; quantized leaves come out as they are.
      policy: the family to write as.

    Raises:
      ParameterError: the tree does not fit its config, or was fused by `prepare`.
    """
    validate(params)
    if is_fused(params):
        raise ParameterError(
            "these parameters were fused by dsjax.prepare, which a checkpoint can not hold; write the tree that "
            "dsjax.load returned"
        )
    leaves = flatten(params)
    for step in policy.weights.steps(params.config):
        if step.leaves[0] in leaves:
            tensors = step.op.to_tensors([leaves[leaf] for leaf in step.leaves], params.config)
            yield from zip(step.tensors, tensors, strict=True)
