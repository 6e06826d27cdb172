"""The parameter tree: what it looks like for a configuration, and the checks that it does.

The tree is a nested dict in Flax style. Weights are `[out, in]`: the contracted axis is the contiguous one, so groups
of quantized weights run along it and checkpoints load without a transpose. After `dsjax.prepare`, `q`, `k`, `v` are
one `qkv` and `gate`, `up` one `gate_up`, joined along `out`.

    embed.weight [V, D]                      layers.0.mlp_norm.scale [D]
    layers.0.attention_norm.scale [D]        layers.0.mlp.gate.weight [F, D]
    layers.0.attention.q.weight [N*H, D]     layers.0.mlp.up.weight [F, D]
    layers.0.attention.k.weight [K*H, D]     layers.0.mlp.down.weight [D, F]
    layers.0.attention.v.weight [K*H, D]     final_norm.scale [D]
    layers.0.attention.out.weight [D, N*H]   head.weight [V, D]     (absent when tied)

Where the config has `qk_norm`, there are

    layers.0.attention.q_norm.scale [H]      layers.0.attention.k_norm.scale [H]

and where it has experts, instead of `gate`, `up` and `down`,

    layers.0.mlp.router.weight [E, D]              layers.0.mlp.experts.up.weight [E, F, D]
    layers.0.mlp.experts.gate.weight [E, F, D]     layers.0.mlp.experts.down.weight [E, D, F]
"""

import dataclasses
import functools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from dsjax.config import ModelConfig
from dsjax.errors import ParameterError
from dsjax.quantization import QuantizedArray


class Params(dict):
    """A nested dict of arrays and quantized leaves that carries its `ModelConfig` as static metadata.

    A pytree: `jax.tree.map`, `jax.grad` and optax give back `Params`. Two trees with equal config and structure share
    compiled programs.
    """

    def __init__(self, tree: dict[str, Any], config: ModelConfig):
        super().__init__(tree)
        self.config = config

    def __repr__(self) -> str:
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(self) if hasattr(leaf, "nbytes")]
        count = sum(math.prod(spec.shape) for spec in leaf_specs(self.config).values())
        return f"Params({self.config.model_type}, {count:,} parameters, {sum(sizes):,} bytes)"


def _flatten_with_keys(params: Params):
    names = tuple(sorted(params))
    return [(jax.tree_util.DictKey(name), params[name]) for name in names], (names, params.config)


def _flatten(params: Params):
    names = tuple(sorted(params))
    return [params[name] for name in names], (names, params.config)


def _unflatten(aux, children):
    names, config = aux
    return Params(dict(zip(names, children, strict=True)), config)


jax.tree_util.register_pytree_with_keys(Params, _flatten_with_keys, _unflatten, _flatten)


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Shape and logical axis names of one leaf, and how a random one is drawn."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"


# What `prepare` joins in each layer: the module, its parts, and what they become.
_FUSIONS = (
    ("attention", ("q", "k", "v"), "qkv"),
    ("mlp", ("gate", "up"), "gate_up"),
    ("mlp.experts", ("gate", "up"), "gate_up"),
)


def _fusions(config: ModelConfig, paths: Container[str]) -> Iterator[tuple[list[str], str]]:
    """Paths of the leaves to join and the path of the result, for those among `paths`."""
    for i in range(config.num_layers):
        for module, parts, fused in _FUSIONS:
            for kind in ("weight", "bias"):
                joined = [f"layers.{i}.{module}.{part}.{kind}" for part in parts]
                if joined[0] in paths:
                    yield joined, f"layers.{i}.{module}.{fused}.{kind}"


@functools.cache
def leaf_specs(config: ModelConfig) -> Mapping[str, LeafSpec]:
    """Spec of each leaf by its dotted path, in the order of the forward pass."""
    c = config
    query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    specs: dict[str, LeafSpec] = {"embed.weight": LeafSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"))}

    def linear(path: str, out: int, inner: int, axes: tuple[str, str], bias: bool):
        specs[f"{path}.weight"] = LeafSpec((out, inner), axes)
        if bias:
            specs[f"{path}.bias"] = LeafSpec((out,), axes[:1], "zeros")

    for i in range(c.num_layers):
        layer = f"layers.{i}"
        specs[f"{layer}.attention_norm.scale"] = LeafSpec((c.hidden_size,), ("embed",), "ones")
        linear(f"{layer}.attention.q", query, c.hidden_size, ("heads", "embed"), c.attention_bias)
        linear(f"{layer}.attention.k", kv, c.hidden_size, ("kv_heads", "embed"), c.attention_bias)
        linear(f"{layer}.attention.v", kv, c.hidden_size, ("kv_heads", "embed"), c.attention_bias)
        if c.qk_norm:
            specs[f"{layer}.attention.q_norm.scale"] = LeafSpec((c.head_dim,), ("head",), "ones")
            specs[f"{layer}.attention.k_norm.scale"] = LeafSpec((c.head_dim,), ("head",), "ones")
        linear(f"{layer}.attention.out", c.hidden_size, query, ("embed", "heads"), c.attention_out_bias)
        specs[f"{layer}.mlp_norm.scale"] = LeafSpec((c.hidden_size,), ("embed",), "ones")
        feed_forward = {
            "gate": ((c.intermediate_size, c.hidden_size), ("mlp", "embed")),
            "up": ((c.intermediate_size, c.hidden_size), ("mlp", "embed")),
            "down": ((c.hidden_size, c.intermediate_size), ("embed", "mlp")),
        }
        if c.num_experts:
            linear(f"{layer}.mlp.router", c.num_experts, c.hidden_size, ("experts", "embed"), False)
        for name, (shape, axes) in feed_forward.items():
            if c.num_experts:
                stack = LeafSpec((c.num_experts, *shape), ("experts", *axes))
                specs[f"{layer}.mlp.experts.{name}.weight"] = stack
            else:
                linear(f"{layer}.mlp.{name}", *shape, axes, c.mlp_bias)
    specs["final_norm.scale"] = LeafSpec((c.hidden_size,), ("embed",), "ones")
    if not c.tie_embeddings:
        specs["head.weight"] = LeafSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"))
    return MappingProxyType(specs)


def unflatten(leaves: dict[str, Any], config: ModelConfig) -> Params:
    """Tree of leaves given by dotted path."""
    return Params(traverse_util.unflatten_dict(leaves, sep="."), config)


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by dotted path; quantized leaves stay whole."""
    return traverse_util.flatten_dict(params, sep=".")


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal weights of variance `1 / in`, unit norms, zero biases.

    Args:
      config: the architecture.
      key: PRNG key.
      dtype: of every leaf.

    Returns:
      A tree that every function of dsjax takes.
    """

    def draw(index: int, spec: LeafSpec):
        if spec.init != "normal":
            return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)
        return jax.random.normal(jax.random.fold_in(key, index), spec.shape, dtype) / math.sqrt(spec.shape[-1])

    return unflatten({path: draw(i, spec) for i, (path, spec) in enumerate(leaf_specs(config).items())}, config)


def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The same tree as `init` in `jax.ShapeDtypeStruct`s: shapes only, no memory."""
    return unflatten(
        {path: jax.ShapeDtypeStruct(spec.shape, dtype) for path, spec in leaf_specs(config).items()}, config
    )


@functools.cache
def _fused_specs(config: ModelConfig) -> Mapping[str, LeafSpec]:
    """The specs of a tree after `prepare`."""
    specs = dict(leaf_specs(config))
    for paths, fused in _fusions(config, leaf_specs(config)):
        pieces = [specs.pop(path) for path in paths]
        shape, out = list(pieces[0].shape), _out_axis(pieces[0].shape)
        shape[out] = sum(piece.shape[out] for piece in pieces)
        specs[fused] = LeafSpec(tuple(shape), pieces[0].axes, pieces[0].init)
    return MappingProxyType(specs)


def _out_axis(shape: Sequence[int]) -> int:
    """Where `out` stands: last in a bias, before the contracted axis in a weight."""
    return max(len(shape) - 2, 0)


def is_fused(params: Params) -> bool:
    """Whether `prepare` has joined the projections of this tree."""
    return "qkv" in params["layers"]["0"]["attention"]


def logical_axes(params: Params) -> dict[str, tuple[str, ...]]:
    """Logical axis names of each leaf by dotted path, fused or not."""
    specs = _fused_specs(params.config) if is_fused(params) else leaf_specs(params.config)
    return {path: spec.axes for path, spec in specs.items()}


def _leaf_problems(params: Params) -> Iterator[str]:
    leaves = flatten(params)
    fused = any(".attention.qkv." in path for path in leaves)
    specs = _fused_specs(params.config) if fused else leaf_specs(params.config)
    for path, spec in specs.items():
        leaf = leaves.get(path)
        if leaf is None:
            yield f"leaf '{path}' is missing; it should be {list(spec.shape)}"
        elif not hasattr(leaf, "shape"):
            yield f"leaf '{path}' is a {type(leaf).__name__}, not an array"
        elif tuple(leaf.shape) != spec.shape:
            yield f"leaf '{path}' has shape {list(leaf.shape)}, the config asks for {list(spec.shape)}"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            yield f"leaf '{path}' has dtype {leaf.dtype}; parameters are floating or quantized leaves"
    for path in sorted(leaves.keys() - specs.keys()):
        yield f"leaf '{path}' is unknown to a {params.config.model_type} model of this config"


def validate(params: Params) -> None:
    """Check the tree against its config.

    Raises:
      ParameterError: names the first leaf that is missing, unknown, of a wrong shape or not floating.
    """
    if not isinstance(params, Params):
        raise ParameterError(
            f"params is a {type(params).__name__}, not a dsjax.Params; wrap a nested dict: dsjax.Params(tree, config)"
        )
    problems = list(_leaf_problems(params))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ParameterError(problems[0] + more)


def prepare(params: Params, *, dtype: Any = None, dequantize: bool = False) -> Params:
    """Fuse q, k, v and gate, up of every layer, and cast: fewer, larger products a step.

    Pure and jittable; gradients and new values pass through. A tree that is already fused is only cast.

    Args:
      params: parameter tree.
      dtype: floating dtype of every plain leaf (and of what quantized leaves stand for), or `None` to keep each.
      dequantize: turn quantized leaves into plain ones.

    Returns:
      The fused tree, with the same config.
    """

    def cast(leaf):
        if isinstance(leaf, QuantizedArray):
            return _dequantize(leaf, dtype=dtype) if dequantize else leaf.astype(dtype or leaf.dtype)
        return leaf if dtype is None else leaf.astype(dtype)

    leaves = {path: cast(leaf) for path, leaf in flatten(params).items()}
    for paths, fused in list(_fusions(params.config, leaves)):
        leaves[fused] = _join([leaves.pop(path) for path in paths])
    return unflatten(leaves, params.config)


_dequantize = jax.jit(QuantizedArray.dequantize, static_argnames="dtype")


@jax.jit
def _join(pieces: list[Any]):
    """Join along `out`; quantized pieces of one scheme stay quantized, mixed ones are dequantized."""
    if all(isinstance(piece, QuantizedArray) for piece in pieces):
        if len({piece.layout for piece in pieces}) == 1:
            return QuantizedArray.concatenate(pieces)
    plain = [piece.dequantize() if isinstance(piece, QuantizedArray) else piece for piece in pieces]
    return jnp.concatenate(plain, axis=_out_axis(plain[0].shape))
