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

Every `weight` may have a `bias` beside it, every `scale` too. What else there is where the config says so:

    positions.weight [R, D]                    layers.0.attention.q_norm.scale [H], [N, H] or [N*H]
    token_types.weight [R, D]                  layers.0.attention.k_norm.scale [H], [K, H] or [K*H]
    embed_norm.scale [D]                       layers.0.attention.sinks [N]
    embed_in.weight [D, embed_size]            layers.0.attention_post_norm.scale [D]
    embed_out.weight [embed_size, D]           layers.0.mlp_post_norm.scale [D]
    pooler.weight [D, D]                       projection.weight [projection_size, D]

A model that reads images has no `embed`, but squares of `C` channels and `p` pixels along a side, and the embedding of
a token that stands before them:

    patches.weight [D, C*p*p]                  patches.class_token [D]

With experts, instead of `gate`, `up` and `down` (`S` is the width of the network that all tokens pass):

    layers.0.mlp.router.weight [E, D]          layers.0.mlp.shared.gate.weight [S, D]
    layers.0.mlp.router.correction [E]         layers.0.mlp.shared.up.weight [S, D]
    layers.0.mlp.experts.gate.weight [E, F, D] layers.0.mlp.shared.down.weight [D, S]
    layers.0.mlp.experts.up.weight [E, F, D]   layers.0.mlp.shared_gate.weight [1 or 2, D]
    layers.0.mlp.experts.down.weight [E, D, F]

With latent attention, instead of `q`, `k` and `v` (`r` is the rank of keys and values, `s` that of queries):

    layers.0.attention.q_down.weight [s, D]    layers.0.attention.kv_down.weight [r + rope_size, D]
    layers.0.attention.q_down_norm.scale [s]   layers.0.attention.kv_down_norm.scale [r]
    layers.0.attention.q.weight [N*H, s or D]  layers.0.attention.k_up.weight [N*nope_size, r]
                                               layers.0.attention.v_up.weight [N*value_size, r]
"""

import dataclasses
import functools
import math
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from dsjax.config import Experts, Latent, ModelConfig, Patches
from dsjax.errors import ParameterError
from dsjax.inputs import is_traced
from dsjax.quantization import QuantizedArray, Recipe, quantize
from dsjax.sharding import named_sharding
from pallas_kernels.dispatch import prefers_kernels


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
    ("mlp.shared", ("gate", "up"), "gate_up"),
)


def _fusions(config: ModelConfig, paths: Container[str]) -> Iterator[tuple[list[str], str]]:
    """Paths of the leaves to join and the path of the result, for those among `paths`."""
    for i in range(config.num_layers):
        for module, parts, fused in _FUSIONS:
            for kind in ("weight", "bias"):
                joined = [f"layers.{i}.{module}.{part}.{kind}" for part in parts]
                if all(path in paths for path in joined):
                    yield joined, f"layers.{i}.{module}.{fused}.{kind}"


class _Specs(dict[str, LeafSpec]):
    """Specs of leaves by dotted path, with the shapes that modules have."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def linear(self, path: str, shape: tuple[int, ...], axes: tuple[str, ...], bias: bool = False):
        self[f"{path}.weight"] = LeafSpec(shape, axes)
        if bias:
            self[f"{path}.bias"] = LeafSpec(shape[:-1], axes[:-1], "zeros")

    def norm(self, path: str, shape: tuple[int, ...], axes: tuple[str, ...] = ("embed",), bias: bool | None = None):
        if self.config.norm_scale:
            self[f"{path}.scale"] = LeafSpec(shape, axes, "zeros" if self.config.norm_offset else "ones")
        if self.config.norm_bias if bias is None else bias:
            self[f"{path}.bias"] = LeafSpec(shape, axes, "zeros")


def _add_attention(specs: _Specs, path: str) -> None:
    c = specs.config
    out = c.num_heads * (c.head_dim if c.latent is None else c.latent.value_size)
    if c.latent is not None:
        _add_latent(specs, path)
    else:
        for name, heads, axis in (("q", c.num_heads, "heads"), ("k", c.num_kv_heads, "kv_heads")):
            specs.linear(f"{path}.{name}", (heads * c.head_dim, c.hidden_size), (axis, "embed"), c.attention_bias)
        v = (c.num_kv_heads * c.head_dim, c.hidden_size)
        specs.linear(f"{path}.v", v, ("kv_heads", "embed"), c.attention_bias)
    if c.qk_norm:
        for name, heads, axis in (("q", c.num_heads, "heads"), ("k", c.num_kv_heads, "kv_heads")):
            shape, axes = {
                "head": ((c.head_dim,), ("head",)),
                "heads": ((heads, c.head_dim), (axis, "head")),
                "whole": ((heads * c.head_dim,), (axis,)),
            }[c.qk_norm]
            specs.norm(f"{path}.{name}_norm", shape, axes, c.qk_norm_bias)
    if c.sinks:
        specs[f"{path}.sinks"] = LeafSpec((c.num_heads,), ("heads",), "zeros")
    specs.linear(f"{path}.out", (c.hidden_size, out), ("embed", "heads"), c.attention_out_bias)


def _add_latent(specs: _Specs, path: str) -> None:
    c, latent = specs.config, specs.config.latent
    assert latent is not None
    if latent.query_rank is not None:
        specs.linear(f"{path}.q_down", (latent.query_rank, c.hidden_size), ("rank", "embed"), c.attention_bias)
        specs[f"{path}.q_down_norm.scale"] = LeafSpec((latent.query_rank,), ("rank",), "ones")
    inner = c.hidden_size if latent.query_rank is None else latent.query_rank
    specs.linear(f"{path}.q", (c.num_heads * c.head_dim, inner), ("heads", "embed"))
    rows = latent.kv_rank + latent.rope_size
    specs.linear(f"{path}.kv_down", (rows, c.hidden_size), ("rank", "embed"), c.attention_bias)
    specs[f"{path}.kv_down_norm.scale"] = LeafSpec((latent.kv_rank,), ("rank",), "ones")
    for name, size in (("k_up", latent.nope_size), ("v_up", latent.value_size)):
        specs.linear(f"{path}.{name}", (c.num_heads * size, latent.kv_rank), ("heads", "rank"))


def _add_mlp(specs: _Specs, path: str, size: int, bias: bool, experts: tuple[int, ...] = ()) -> None:
    c, stack = specs.config, ("experts",) * len(experts)
    for name in ("gate", "up") if c.gated else ("up",):
        specs.linear(f"{path}.{name}", (*experts, size, c.hidden_size), (*stack, "mlp", "embed"), bias)
    specs.linear(f"{path}.down", (*experts, c.hidden_size, size), (*stack, "embed", "mlp"), bias)


def _add_experts(specs: _Specs, path: str, experts: Experts) -> None:
    c = specs.config
    specs.linear(f"{path}.router", (experts.count, c.hidden_size), ("experts", "embed"), experts.router_bias)
    if experts.correction:
        specs[f"{path}.router.correction"] = LeafSpec((experts.count,), ("experts",), "zeros")
    _add_mlp(specs, f"{path}.experts", experts.size, experts.bias, (experts.count,))
    if experts.shared_size:
        _add_mlp(specs, f"{path}.shared", experts.shared_size, c.mlp_bias)
        if experts.shared_mix != "sum":
            rows, bias = {"gate": (1, False), "coefficient": (2, True)}[experts.shared_mix]
            specs.linear(f"{path}.shared_gate", (rows, c.hidden_size), ("experts", "embed"), bias)


@functools.cache
def leaf_specs(config: ModelConfig) -> Mapping[str, LeafSpec]:
    """Spec of each leaf by its dotted path, in the order of the forward pass."""
    c = config
    specs = _Specs(config)
    width = (c.hidden_size,)
    if c.patches is None:
        specs.linear("embed", (c.vocab_size, c.embed_dim), ("vocab", "embed"))
    else:
        specs.linear("patches", (c.hidden_size, c.patches.channels * c.patches.size**2), ("embed", "embed"))
        specs["patches.class_token"] = LeafSpec(width, ("embed",))
    if c.embed_size is not None:
        specs.linear("embed_in", (c.hidden_size, c.embed_size), ("embed", "embed"))
    for name, rows in (("positions", c.learned_positions), ("token_types", c.token_types)):
        if rows:
            specs.linear(name, (rows, c.hidden_size), ("positions", "embed"))
    if c.embed_norm:
        specs.norm("embed_norm", width)
    for i in range(c.num_layers):
        path, layer = f"layers.{i}", c.layer(i)
        if layer.attention_norm:
            specs.norm(f"{path}.attention_norm", width)
        _add_attention(specs, f"{path}.attention")
        if c.norm_placement != "pre":
            specs.norm(f"{path}.attention_post_norm", width)
        if c.norm_placement in ("pre", "both") and not c.shared_norm:
            specs.norm(f"{path}.mlp_norm", width)
        if layer.experts and c.experts is not None:
            _add_experts(specs, f"{path}.mlp", c.experts)
        else:
            _add_mlp(specs, f"{path}.mlp", c.intermediate_size, c.mlp_bias)
        if c.norm_placement != "pre":
            specs.norm(f"{path}.mlp_post_norm", width)
    if c.final_norm:
        specs.norm("final_norm", width)
    if c.pooler == "tanh":
        specs.linear("pooler", (c.hidden_size, c.hidden_size), ("embed", "embed"), True)
    if c.projection_size is not None:
        specs.linear("projection", (c.projection_size, c.hidden_size), ("embed", "embed"))
    if c.embed_size is not None:
        specs.linear("embed_out", (c.embed_size, c.hidden_size), ("embed", "embed"))
    if not c.lm_head:
        return MappingProxyType(dict(specs))
    if not c.tie_embeddings:
        specs.linear("head", (c.vocab_size, c.embed_dim), ("vocab", "embed"), c.head_bias)
    elif c.head_bias:
        specs["head.bias"] = LeafSpec((c.vocab_size,), ("vocab",), "zeros")
    return MappingProxyType(dict(specs))


@functools.cache
def _leaf_names() -> frozenset[str]:
    """Every leaf that a model may have, with 0 for its layer."""
    one = ModelConfig("any", 1, 2, 1, 1, 1, 1, 2, 1)
    both = Experts(1, 1, 1, router_bias=True, correction=True, bias=True, shared_size=1, shared_mix="coefficient")
    full = dataclasses.replace(
        one,
        norm_bias=True,
        norm_placement="both",
        embed_norm=True,
        qk_norm="head",
        qk_norm_bias=True,
        embed_size=1,
        token_types=1,
        learned_positions=1,
        attention_bias=True,
        attention_out_bias=True,
        sinks=True,
        mlp_bias=True,
        head_bias=True,
        pooler="tanh",
        projection_size=1,
    )
    variants = [full, dataclasses.replace(full, experts=both)]
    variants.append(dataclasses.replace(full, latent=Latent(1, 1, 2, 1, 1)))
    variants.append(dataclasses.replace(full, patches=Patches(1, 1)))
    return frozenset(name for config in variants for name in leaf_specs(config))


def is_known(path: str) -> bool:
    """Whether some model has a leaf of this dotted path."""
    parts = path.split(".")
    if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal():
        parts[1] = "0"
    return ".".join(parts) in _leaf_names()


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


def _specs_of(params: Params) -> Mapping[str, LeafSpec]:
    """The specs of a tree, with its joined projections."""
    return _fused_specs(params.config, frozenset(path for path in flatten(params) if _is_fused(path)))


@functools.cache
def _fused_specs(config: ModelConfig, joined: frozenset[str]) -> Mapping[str, LeafSpec]:
    specs = dict(leaf_specs(config))
    for paths, fused in _fusions(config, leaf_specs(config)):
        if fused not in joined:
            continue
        pieces = [specs.pop(path) for path in paths]
        shape, out = list(pieces[0].shape), _out_axis(fused)
        shape[out] = sum(piece.shape[out] for piece in pieces)
        specs[fused] = LeafSpec(tuple(shape), pieces[0].axes, pieces[0].init)
    return MappingProxyType(specs)


def _out_axis(path: str) -> int:
    """Where `out` stands: last in a bias, before the contracted axis in a weight."""
    return -1 if path.endswith(".bias") else -2


def is_fused(params: Params) -> bool:
    """Whether `prepare` has joined the projections of this tree."""
    return any(map(_is_fused, flatten(params)))


def _is_fused(path: str) -> bool:
    return ".qkv." in path or ".gate_up." in path


def logical_axes(params: Params) -> dict[str, tuple[str, ...]]:
    """Logical axis names of each leaf by dotted path, fused or not."""
    return {path: spec.axes for path, spec in _specs_of(params).items()}


def leaf_sharding(leaf: Any, axes: tuple[str, ...], mesh: jax.sharding.Mesh | None) -> Any:
    """Where a leaf lives: a sharding, of a quantized leaf one for each of its arrays, or `None` without a mesh.

    Args:
      leaf: arrays, or their shapes.
      axes: logical names of the axes of the weight.
      mesh: devices; see `named_sharding`.
    """
    if mesh is None:
        return None
    if isinstance(leaf, QuantizedArray):
        return leaf.shardings(named_sharding(mesh, axes, leaf.units))
    return named_sharding(mesh, axes, leaf.shape)


def _leaf_problems(params: Params) -> Iterator[str]:
    leaves = flatten(params)
    specs = _specs_of(params)
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


def leaf_dtype(path: str, dtype: Any) -> Any:
    """The dtype of a plain leaf in a tree of `dtype`: float32 for what rounding would choose other experts by."""
    return jnp.float32 if path.endswith(".router.correction") else dtype


def prepare(
    params: Params,
    recipe: Recipe | None = None,
    *,
    dtype: Any = None,
    dequantize: bool = False,
    tiled: bool | None = None,
) -> Params:
    """Quantize if asked, fuse q, k, v and gate, up of every layer, cast, and lay quantized leaves out for kernels.

    Pure and jittable; gradients and new values pass through. A tree that is already fused is only cast.

    Args:
      params: parameter tree.
      recipe: as for `dsjax.quantize`; `None` leaves weights as they are.
      dtype: floating dtype of every plain leaf (and of what quantized leaves stand for), or `None` to keep each; see
        `leaf_dtype`.
      dequantize: turn quantized leaves into plain ones.
      tiled: lay quantized leaves out in the order in which kernels read them; `None` does so where kernels run, which
        is on one GPU. Pieces that are quantized in different ways are not fused.

    Returns:
      The fused tree, with the same config.

    Raises:
      ConfigError: as `dsjax.quantize`.
      ParameterError: as `dsjax.quantize`.
    """
    if recipe is not None:
        params = quantize(params, recipe)

    def cast(path, leaf):
        if isinstance(leaf, QuantizedArray):
            return _dequantize(leaf, dtype=dtype) if dequantize else leaf.astype(dtype or leaf.dtype)
        return leaf if dtype is None else leaf.astype(leaf_dtype(path, dtype))

    leaves = {path: cast(path, leaf) for path, leaf in flatten(params).items()}
    # Weights that change their inputs, each in its own way, have no product in common.
    apart = {path.rpartition(".")[0] for path, leaf in leaves.items() if getattr(leaf, "has_own_inputs", False)}
    for paths, fused in list(_fusions(params.config, leaves)):
        pieces = [leaves[path] for path in paths]
        kinds = {piece.kind if isinstance(piece, QuantizedArray) else None for piece in pieces}
        if len(kinds) > 1 or any(path.rpartition(".")[0] in apart for path in paths):
            continue
        leaves[fused] = _join([leaves.pop(path) for path in paths], axis=_out_axis(fused))
    if prefers_kernels(None) if tiled is None else tiled:
        leaves = {path: _tiled(path, leaf, params.config) for path, leaf in leaves.items()}
    return unflatten(leaves, params.config)


def prepare_in_place(params: Params, *, dequantize: bool = False) -> Params:
    """`prepare` a layer at a time, for who owns the tree: there are never two copies of the model.

    Args:
      params: parameter tree, which is changed.
      dequantize: as for `prepare`.

    Returns:
      The same tree.
    """
    one_layer = dataclasses.replace(params.config, num_layers=1, windows=())
    layers = params["layers"]
    for name in layers:
        ready = _prepare_part({"layers": {"0": layers[name]}}, one_layer, dequantize)
        layers[name] = jax.block_until_ready(ready["layers"]["0"])
    for name in params.keys() - {"layers"}:
        params[name] = _prepare_part({name: params[name]}, one_layer, dequantize)[name]
    return params


@functools.partial(jax.jit, static_argnames=("config", "dequantize"))
def _prepare_part(part: dict[str, Any], config: ModelConfig, dequantize: bool) -> dict[str, Any]:
    return dict(prepare(Params(part, config), dequantize=dequantize))


def _tiled(path: str, leaf: Any, config: ModelConfig) -> Any:
    """A leaf for kernels: not those of which single rows are taken, nor what is spread over devices."""
    is_table = path == "embed.weight" and not config.tie_embeddings
    if not isinstance(leaf, QuantizedArray) or is_table or leaf.scheme.activations is not None:
        return leaf
    if not is_traced(leaf.values) and len(leaf.values.sharding.device_set) > 1:
        return leaf
    return _tile(leaf)


_tile = jax.jit(QuantizedArray.tiled)
_dequantize = jax.jit(QuantizedArray.dequantize, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames="axis")
def _join(pieces: list[Any], axis: int):
    """Join along `out` what is of one kind."""
    if isinstance(pieces[0], QuantizedArray):
        return QuantizedArray.concatenate(pieces)
    return jnp.concatenate(pieces, axis=axis)
