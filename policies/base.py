"""The mapping language: which checkpoint tensors fill which leaves, checked before any weight is read, and reversible.

A family is a `Policy`: how its configuration reads, and a `WeightMap` of entries between leaves and tensors. An entry
names one or several of each and the operation between them, so a fused or stacked tensor is a new `Op`, not new code
elsewhere.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import Params, flatten, is_fused, is_known, leaf_specs, validate
from dsjax.quantization import QuantizedArray
from policies.fields import Codec, model_config
from policies.ops import Copy, Leaf, Op, Shape, Turned
from policies.quantized import check_config

# Fields that any Hugging Face config.json may hold and that do not change what the model computes at inference:
# provenance, storage, training, and the generation settings that older releases kept there.
HARMLESS_FIELDS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout attn_implementation auto_map
    attn_pdrop bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)

# Fields that are fine at the value which means "not used" and change the mathematics at any other.
FIXED_FIELDS: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a weight map; `{i}` in the names stands for every layer, `{e}` in a tensor's for every expert.

    Attributes:
      leaves: dotted path of the leaf, or several for an operation that fills them together. Of several, those that a
        config lacks are left out.
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
class Either:
    """Entries in several spellings; a checkpoint has one of them, and the first is written.

    Attributes:
      spellings: tuples of entries that fill the same leaves. One whose first leaf the config lacks is not taken.
      choose: which of them the checkpoints of a config have, in families where it is the config that decides.
    """

    spellings: tuple[tuple[Entry, ...], ...]
    choose: Callable[[ModelConfig], int] | None = None


_COPY = Copy()


def each(kinds: Iterable[str], leaf: str, tensor: str, op: Op = _COPY, **options: Any) -> tuple[Entry, ...]:
    """Entries of one module: `each(("weight", "bias"), "layers.{i}.attention.q", "h.{i}.q_proj")`."""
    return tuple(Entry(f"{leaf}.{kind}", f"{tensor}.{kind}", op, **options) for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Step:
    """An entry with its layer and experts filled in, for the leaves that the config has."""

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

    def read(self, name: str) -> np.ndarray | QuantizedArray | Turned:
        """One tensor in memory of its own, as the file stores it."""
        ...


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Entries between leaves and checkpoint tensors.

    Attributes:
      entries: one for each leaf that a model of the family may have, in every spelling that its checkpoints use.
      ignored: patterns (regular expressions) of tensors to ignore.
      prefix: what the names of tensors begin with in some checkpoints of the family and not in others.
      optional: fields of `ModelConfig` for parts that some checkpoints have and some lack, whatever their config.json
        says, each with a tensor of that part. Without it the field has its default.
    """

    entries: tuple[Entry | Either, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def present(self, config: ModelConfig, names: Collection[str]) -> ModelConfig:
        """The config of a checkpoint that has these tensors: without the optional parts that it lacks."""
        absent = {
            field.name: field.default
            for field in dataclasses.fields(config)
            if (tensor := self.optional.get(field.name)) and not {tensor, tensor.removeprefix(self.prefix)} & set(names)
        }
        return dataclasses.replace(config, **absent)

    def without(self, tensors: Collection[str]) -> "WeightMap":
        """The same map for checkpoints that have these tensors although a model may do without them."""
        return dataclasses.replace(self, ignored=(*self.ignored, *map(re.escape, tensors))) if tensors else self

    def steps(self, config: ModelConfig, names: Iterable[str] | None = None) -> list[Step]:
        """The entries of this config, layer by layer; those of leaves that it lacks (a bias, a tied head) come too.

        Args:
          config: the architecture.
          names: of the tensors in a checkpoint, to choose among spellings; `None` takes the first.

        Raises:
          ConfigError: two entries fill one leaf or use one tensor, an entry fills a leaf that no config has, or a leaf
            of this config is filled by none.
        """
        names = None if names is None else set(names)
        steps, filled, used = [], set(), set()
        specs = leaf_specs(config)
        for entry in self._spelled(config, names):
            leaves = (entry.leaves,) if isinstance(entry.leaves, str) else entry.leaves
            tensors = (entry.tensors,) if isinstance(entry.tensors, str) else entry.tensors
            for i in range(config.num_layers if "{i}" in leaves[0] else 1):
                step = self._step(entry, leaves, tensors, i, config)
                for leaf in step.leaves:
                    if not is_known(leaf):
                        raise ConfigError(f"the weight map fills leaf '{leaf}', which no model has")
                    if leaf in filled:
                        raise ConfigError(f"two entries of the weight map fill leaf '{leaf}'")
                    filled.add(leaf)
                for tensor in step.tensors:
                    if tensor in used:
                        raise ConfigError(f"two entries of the weight map use tensor '{tensor}'")
                    used.add(tensor)
                present = tuple(leaf for leaf in step.leaves if leaf in specs)
                steps.append(dataclasses.replace(step, leaves=present or step.leaves))
        for leaf in specs:
            if leaf not in filled:
                raise ConfigError(f"no entry of the weight map fills leaf '{leaf}'")
        if names and self.prefix and not any(name.startswith(self.prefix) for name in names):
            bare = [tuple(tensor.removeprefix(self.prefix) for tensor in step.tensors) for step in steps]
            return [dataclasses.replace(step, tensors=tensors) for step, tensors in zip(steps, bare, strict=True)]
        return steps

    def _step(self, entry: Entry, leaves, tensors, layer: int, config: ModelConfig) -> Step:
        experts = config.experts.count if config.experts else 0
        tensors = _of_experts(_at_layer(tensors, layer), experts)
        return Step(_at_layer(leaves, layer), tensors, entry.op, entry.redundant)

    def _spelled(self, config: ModelConfig, names: set[str] | None) -> Iterator[Entry]:
        """The entries, of several spellings the one whose tensors are there."""
        for entry in self.entries:
            if isinstance(entry, Entry):
                yield entry
            elif entry.choose is not None:
                yield from entry.spellings[entry.choose(config)]
            else:
                fitting = [spelling for spelling in entry.spellings if self._has_leaf(spelling, config)]
                fitting = fitting or entry.spellings
                found = [spelling for spelling in fitting if self._is_there(spelling, config, names or set())]
                yield from (found or fitting)[0]

    def _has_leaf(self, spelling: tuple[Entry, ...], config: ModelConfig) -> bool:
        """Whether the config has the leaf of a spelling's first entry, in any layer."""
        leaves = spelling[0].leaves
        leaf = leaves if isinstance(leaves, str) else leaves[0]
        return any(leaf.replace("{i}", str(i)) in leaf_specs(config) for i in range(config.num_layers))

    def _is_there(self, spelling: tuple[Entry, ...], config: ModelConfig, names: set[str]) -> bool:
        """Whether any tensor of a spelling's first entry is there, in any layer."""
        tensors = spelling[0].tensors
        tensor = (tensors if isinstance(tensors, str) else tensors[0]).replace("{e}", "0")
        wanted = {tensor.replace("{i}", str(i)) for i in range(config.num_layers)}
        return bool(names & (wanted | {name.removeprefix(self.prefix) for name in wanted}))

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
        steps = self.steps(config, shapes)
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
        ignored = [re.compile(rf"({re.escape(self.prefix)})?({pattern})") for pattern in self.ignored]
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
    specs = leaf_specs(config)
    leaf_shapes = [specs[leaf].shape for leaf in step.leaves]
    leaves = step.op.to_leaves([source.read(name) for name in step.tensors], config, leaf_shapes)
    yield from zip(step.leaves, leaves, strict=True)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model family as data: how its configuration reads and writes, and where its weights go.

    Attributes:
      name: of the policy, for messages.
      model_types: values of `model_type` in config.json that it serves.
      weights: the map between leaves and the tensors of a Hugging Face checkpoint.
      config: what turns fields of config.json into those of `ModelConfig` and back, in this order.
      architecture: transformers' model class, as config.json names it.
      traits: fields of `ModelConfig` that are the same in every model of the family.
      harmless: names of further fields of config.json that do not change what the model computes.
      fixed: further fields that must hold the given value.
      example: fields of `ModelConfig` that some model of the family has, for checking the map when it is registered;
        `{"experts.count": 4}` for one with experts.
    """

    name: str
    model_types: tuple[str, ...]
    weights: WeightMap
    config: tuple[Codec, ...]
    architecture: str
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read_config(self, raw: dict[str, Any]) -> ModelConfig:
        """Configuration from a parsed config.json.

        Raises:
          ConfigError: names a field that is unknown, missing, or asks for mathematics that is not supported.
        """
        if raw.get("quantization_config") is not None:
            check_config(raw["quantization_config"])
        fields = frozenset().union(*(codec.fields for codec in self.config))
        fixed = {**FIXED_FIELDS, **self.fixed}
        for name, value in raw.items():
            if value is None or name in fields or name in self.harmless or name in HARMLESS_FIELDS:
                continue
            if name not in fixed:
                raise ConfigError(
                    f"config field {name}={value!r} is unknown to the {self.name} policy and may change what the "
                    "model computes; remove it if it does not"
                )
            if value != fixed[name]:
                raise ConfigError(f"config field {name}={value!r} is not supported; only {fixed[name]!r} is")
        known = dict(self.traits)
        for codec in self.config:
            known |= codec.read(raw, known)
        return model_config(known)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of a config.json that reads as this configuration.

        Raises:
          ConfigError: names what this family's config.json can not express.
        """
        raw: dict[str, Any] = {"architectures": [self.architecture]}
        for codec in self.config:
            raw |= codec.write(config)
        try:
            back = self.read_config(raw)
        except ConfigError as error:
            raise ConfigError(f"this configuration has no spelling in a {self.name} config.json: {error}") from error
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            is_absent = field.name in self.weights.optional and value == field.default
            if value != getattr(back, field.name) and not is_absent:
                raise ConfigError(f"{field.name}={value!r} has no spelling in a {self.name} config.json")
        return raw


def write_tensors(
    params: Params, policy: Policy, convert: Callable[[Any], Leaf] = lambda leaf: leaf
) -> Iterator[tuple[str, Leaf]]:
    """Checkpoint tensors of a parameter tree as `(name, array)`: the reverse of loading.

    Args:
      params: a tree as loaded, not fused; quantized leaves come out as they are.
      policy: the family to write as.
      convert: what is done to each leaf first.

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
            tensors = step.op.to_tensors([convert(leaves[leaf]) for leaf in step.leaves], params.config)
            yield from zip(step.tensors, tensors, strict=True)
