"""llama.cpp's tensor names as weight maps.

Every architecture uses the same names, so one map is nearly right for all of them: entries of leaves that a model lacks
are passed over. What differs is how rows are ordered, what is fused, and which name a norm has.
"""

import dataclasses
from collections.abc import Mapping

from dsjax.config import ModelConfig
from policies.base import Either, Entry, Shape, Step, WeightMap, each
from policies.ops import Copy, InterleavedRotary, Join, Leaf, Op, Reshape, Stack

_COPY = Copy()
_KINDS = ("weight", "bias")
_LAYER, _BLOCK = "layers.{i}", "blk.{i}"
_EXPERTS = f"{_LAYER}.mlp.experts"
_SHARED_GATE = "ffn_gate_inp_shexp.weight"
_NORMS = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
}


@dataclasses.dataclass(frozen=True)
class PlusOne:
    """The tensor is the leaf plus one: scales of Gemma's norms, which Hugging Face stores around zero."""

    def tensor_shapes(self, leaf_shapes: list[Shape], config: ModelConfig) -> list[Shape]:
        """The same shapes."""
        return leaf_shapes

    def to_leaves(self, tensors: list[Leaf], config: ModelConfig, leaf_shapes: list[Shape]) -> list[Leaf]:
        """One less."""
        return [tensor - tensor.dtype.type(1) for tensor in tensors]

    def to_tensors(self, leaves: list[Leaf], config: ModelConfig) -> list[Leaf]:
        """One more."""
        return [leaf + leaf.dtype.type(1) for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class GgufWeightMap(WeightMap):
    """A weight map of GGUF files; the gate of shared experts has an axis of length one in some, and not in others."""

    def fit(self, config: ModelConfig, shapes: Mapping[str, Shape], origin: str) -> list[Step]:
        """See `WeightMap.fit`."""
        flat = {name: shape[-1:] if name.endswith(_SHARED_GATE) else shape for name, shape in shapes.items()}
        return super().fit(config, flat, origin)


def _norm(leaf: str, tensor: str, op: Op) -> tuple[Entry, ...]:
    return Entry(f"{leaf}.scale", f"{tensor}.weight", op), Entry(f"{leaf}.bias", f"{tensor}.bias")


def gguf_qkv(rotary: Op) -> tuple[Entry | Either, ...]:
    """Entries of query, key and value projections, apart or as one tensor.

    Args:
      rotary: how rows of queries and keys are ordered.
    """
    attention = f"{_LAYER}.attention"
    ops = {"q": rotary, "k": rotary, "v": _COPY}
    parts = tuple(
        entry for part, op in ops.items() for entry in each(_KINDS, f"{attention}.{part}", f"{_BLOCK}.attn_{part}", op)
    )
    if rotary != _COPY:
        return parts
    fused = tuple(
        Entry(tuple(f"{attention}.{part}.{kind}" for part in "qkv"), f"{_BLOCK}.attn_qkv.{kind}", Join())
        for kind in _KINDS
    )
    return (Either((parts, fused)),)


def _gate_up(fused: bool) -> tuple[Entry, ...]:
    gate, up = f"{_LAYER}.mlp.gate", f"{_LAYER}.mlp.up"
    if fused:
        return tuple(Entry((f"{gate}.{kind}", f"{up}.{kind}"), f"{_BLOCK}.ffn_up.{kind}", Join()) for kind in _KINDS)
    return *each(_KINDS, gate, f"{_BLOCK}.ffn_gate"), *each(_KINDS, up, f"{_BLOCK}.ffn_up")


def _experts() -> tuple[Entry | Either, ...]:
    names = ("gate", "up", "down")
    down = each(_KINDS, f"{_EXPERTS}.down", f"{_BLOCK}.ffn_down_exps")
    spellings = (
        (
            *each(_KINDS, f"{_EXPERTS}.gate", f"{_BLOCK}.ffn_gate_exps"),
            *each(_KINDS, f"{_EXPERTS}.up", f"{_BLOCK}.ffn_up_exps"),
            *down,
        ),
        (
            *(
                Entry(
                    (f"{_EXPERTS}.gate.{kind}", f"{_EXPERTS}.up.{kind}"),
                    f"{_BLOCK}.ffn_gate_up_exps.{kind}",
                    Join(axis=axis),
                )
                for kind, axis in (("weight", -2), ("bias", -1))
            ),
            *down,
        ),
        # A tensor for each expert, as files of Mixtral's first months have it.
        tuple(
            Entry(f"{_EXPERTS}.{name}.{kind}", f"{_BLOCK}.ffn_{name}.{{e}}.{kind}", Stack())
            for name in names
            for kind in _KINDS
        ),
    )
    return (
        *each(_KINDS, f"{_LAYER}.mlp.router", f"{_BLOCK}.ffn_gate_inp"),
        Entry(f"{_LAYER}.mlp.router.correction", f"{_BLOCK}.exp_probs_b.bias"),
        Either(spellings),
        *(
            entry
            for name in names
            for entry in each(_KINDS, f"{_LAYER}.mlp.shared.{name}", f"{_BLOCK}.ffn_{name}_shexp")
        ),
        Entry(f"{_LAYER}.mlp.shared_gate.weight", f"{_BLOCK}.{_SHARED_GATE}", Reshape(lambda shape: shape[1:])),
    )


def gguf_map(
    *,
    qkv: tuple[Entry | Either, ...] | None = None,
    norm: Op = _COPY,
    norms: Mapping[str, str] | Either = _NORMS,
    fused_mlp: bool = False,
) -> GgufWeightMap:
    """The weight map of an architecture.

    Args:
      qkv: entries of query, key and value projections, where rows are not in Hugging Face's order.
      norm: how scales of norms are stored.
      norms: names of a layer's norms, or the entries.
      fused_mlp: `ffn_up` holds the rows of the gate, then its own.
    """
    if isinstance(norms, Either):
        of_layer: tuple[Entry | Either, ...] = (norms,)
    else:
        of_layer = tuple(
            entry for leaf, tensor in norms.items() for entry in _norm(f"{_LAYER}.{leaf}", f"{_BLOCK}.{tensor}", norm)
        )
    return GgufWeightMap(
        entries=(
            Entry("embed.weight", "token_embd.weight"),
            Entry("positions.weight", "position_embd.weight"),
            *_norm("embed_norm", "token_embd_norm", norm),
            *of_layer,
            *(qkv or gguf_qkv(_COPY)),
            *_norm(f"{_LAYER}.attention.q_norm", f"{_BLOCK}.attn_q_norm", norm),
            *_norm(f"{_LAYER}.attention.k_norm", f"{_BLOCK}.attn_k_norm", norm),
            Entry(f"{_LAYER}.attention.sinks", f"{_BLOCK}.attn_sinks.weight"),
            *each(_KINDS, f"{_LAYER}.attention.out", f"{_BLOCK}.attn_output"),
            *_gate_up(fused_mlp),
            *each(_KINDS, f"{_LAYER}.mlp.down", f"{_BLOCK}.ffn_down"),
            *_experts(),
            *_norm("final_norm", "output_norm", norm),
            *each(_KINDS, "head", "output"),
        ),
        # Rotary factors become part of the config; older files also stored frequencies for each layer.
        ignored=(r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight", r"blk\.\d+\.attn_rot_embd"),
    )


GGUF = gguf_map()
# llama.cpp turns neighbouring rows where Hugging Face turns rows half a head apart.
GGUF_INTERLEAVED = gguf_map(qkv=gguf_qkv(InterleavedRotary()))
GGUF_PLUS_ONE = gguf_map(norm=PlusOne())
GGUF_FUSED_MLP = gguf_map(fused_mlp=True)
# The norm before the feed-forward layer has the name that others give to one after attention.
GGUF_GPT_OSS = gguf_map(norms={"attention_norm": "attn_norm", "mlp_norm": "post_attention_norm"})
# Of two norms, the second is attention's.
GGUF_FALCON = gguf_map(
    norms=Either(
        (
            (
                *_norm(f"{_LAYER}.attention_norm", f"{_BLOCK}.attn_norm", _COPY),
                *_norm(f"{_LAYER}.mlp_norm", f"{_BLOCK}.ffn_norm", _COPY),
            ),
            (
                *_norm(f"{_LAYER}.attention_norm", f"{_BLOCK}.attn_norm_2", _COPY),
                *_norm(f"{_LAYER}.mlp_norm", f"{_BLOCK}.attn_norm", _COPY),
            ),
        ),
        choose=lambda config: 0 if config.shared_norm else 1,
    )
)
