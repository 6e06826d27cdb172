"""The frozen description of a model: everything about an architecture that is not a weight."""

import dataclasses
from typing import Literal

from dsjax.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clamped_swiglu"]
# Activations of gate and input together, not of the gate alone.
JOINT_ACTIVATIONS = ("clamped_swiglu",)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    Attributes:
      kind: `"linear"` divides every frequency by `factor` (position interpolation, arXiv 2306.15595). `"dynamic"`
        raises the base for sequences longer than `original_context` (NTK-aware scaling). `"yarn"` divides the low
        frequencies and keeps the high ones, with a ramp between (arXiv 2309.00071). `"llama3"` divides only
        frequencies whose wavelength exceeds the original context, with a smooth ramp between (Llama 3.1). `"longrope"`
        divides frequency `i` by `factors[i]`, or by `long_factors[i]` for sequences longer than `original_context`
        (arXiv 2402.13753). `"factors"` divides frequency `i` by `factors[i]` (what GGUF files store).
      factor: the divisor of `"linear"`, `"yarn"` and `"llama3"`; for `"dynamic"`, how many times longer a text may be.
      low_freq_factor: `"llama3"`: wavelengths above `original_context / low_freq_factor` are divided whole.
      high_freq_factor: `"llama3"`: wavelengths below `original_context / high_freq_factor` stay as they are.
      original_context: the context length of pre-training, in tokens.
      factors: `"factors"` and `"longrope"`: a divisor for each rotated pair.
      long_factors: `"longrope"`: those of longer sequences.
      beta_fast: `"yarn"`: pairs that turn at least this often within the original context are kept.
      beta_slow: `"yarn"`: pairs that turn at most this often are divided whole.
      truncate: `"yarn"`: the ends of the ramp are rounded outwards to whole pairs.
      attention_factor: `"yarn"` and `"longrope"`: what cosine and sine are multiplied by.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of a feed-forward network.

    Attributes:
      count: feed-forward networks of a layer that a router chooses from (E).
      per_token: how many it chooses.
      size: width of one.
      layers: which layers have experts; empty for all.
      jitter: `"sparsemixer"`: logits below the best by more than twice this, relatively, are left out.
      score: of an expert for a token: `"softmax"` over all experts, `"sigmoid"` of its own logit (DeepSeek-V3), or
        `"sparsemixer"`, which chooses two, each by a softmax over those about as good (PhiMoE, arXiv 2409.12136).
      renormalize: the weights of those chosen add up to 1; else they are their scores.
      router_bias: the router has a bias.
      correction: a bias that is added to the scores for choosing, not for weighting (arXiv 2408.15664).
      groups: experts are in so many groups, and only those of the best groups can be chosen.
      groups_per_token: how many groups.
      group_score: of a group: its best expert's, or the sum of its two best.
      scale: what the weights are multiplied by in the end.
      bias: the experts' products have biases.
      shared_size: width of a network that every token passes; 0 for none.
      shared_mix: how its output is added: `"sum"`; `"gate"`, times a sigmoid gate of its own (Qwen2-MoE); or
        `"coefficient"`, the two outputs weighted by a softmax of two logits (residual experts, arXiv 2201.05596).
    """

    count: int
    per_token: int
    size: int
    layers: tuple[bool, ...] = ()
    jitter: float = 0.01
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    renormalize: bool = True
    router_bias: bool = False
    correction: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    scale: float = 1.0
    bias: bool = False
    shared_size: int = 0
    shared_mix: Literal["sum", "gate", "coefficient"] = "sum"

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ConfigError(f"experts.per_token={self.per_token} must be from 1 to experts.count={self.count}")
        if self.size < 1 or self.shared_size < 0:
            raise ConfigError(f"experts of width {self.size}, shared {self.shared_size}: widths must be positive")
        if self.count % self.groups or not 1 <= self.groups_per_token <= self.groups:
            raise ConfigError(
                f"experts.groups={self.groups} must divide experts.count={self.count}, and "
                f"experts.groups_per_token={self.groups_per_token} must be from 1 to that"
            )
        if self.groups > 1 and self.group_score == "top2" and self.count == self.groups:
            raise ConfigError("experts.group_score='top2' needs groups of two experts at least")
        if self.per_token > self.count // self.groups * self.groups_per_token:
            raise ConfigError(
                f"{self.groups_per_token} of {self.groups} groups hold fewer than {self.per_token} experts"
            )
        if self.score == "sparsemixer" and self.per_token != 2:
            raise ConfigError(f"experts.score='sparsemixer' chooses 2 experts, not {self.per_token}")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one compressed vector a token.

    Attributes:
      kv_rank: size of the compressed keys and values.
      query_rank: size of compressed queries, or `None` where queries are projected at once.
      rope_size: size of the part of a head that is rotated; one key for all heads.
      nope_size: size of the part that is not.
      value_size: size of a value head.
      norm_eps: epsilon of the norms of the compressed vectors.
    """

    kv_rank: int
    query_rank: int | None
    rope_size: int
    nope_size: int
    value_size: int
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Patches:
    """Images in place of texts (ViT, arXiv 2010.11929): a token for each square of pixels, after one for the whole.

    Attributes:
      image_size: pixels along a side of the image.
      size: pixels along a side of a square.
      channels: values of a pixel.
    """

    image_size: int
    size: int
    channels: int = 3

    def __post_init__(self):
        if self.channels < 1 or not 1 <= self.size <= self.image_size:
            raise ConfigError(f"patches of {self.size} pixels do not fit an image of {self.image_size}")

    @property
    def count(self) -> int:
        """Squares of an image; pixels of a last row or column that do not fill one are left out."""
        return (self.image_size // self.size) ** 2


@dataclasses.dataclass(frozen=True)
class Layer:
    """What sets one layer apart from the others of its model: static, so that equal layers share a trace.

    Attributes:
      window: sliding window in tokens, or `None`.
      rotary: which frequencies rotate queries and keys; `None` for none.
      scale: of attention scores.
      experts: whether its feed-forward network is a mixture of experts.
      attention_norm: whether there is a norm before attention.
    """

    window: int | None
    rotary: Literal["global", "local"] | None
    scale: float
    experts: bool
    attention_norm: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the transformer computes, as hashable data; it is static metadata of the parameter tree.

    Attributes:
      model_type: the family's name as Hugging Face spells it, for messages and for writing checkpoints back.
      vocab_size: rows of the embedding (V); 0 of a model that reads images.
      hidden_size: width of the residual stream (D).
      intermediate_size: width of the feed-forward layer (F).
      num_layers: transformer layers (L).
      num_heads: query heads (N).
      num_kv_heads: key/value heads (K); divides `num_heads`.
      head_dim: size of one head (H); `num_heads * head_dim` need not equal `hidden_size`.
      max_context: longest sequence in tokens that the model was made for.
      causal: a token sees those before it; else all of its text (encoders).

      norm: `"rms"` (arXiv 1910.07467) or `"layer"` (arXiv 1607.06450).
      norm_eps: epsilon of every norm.
      norm_offset: what is added to the scales of norms (1 in Gemma, whose checkpoints store scales around 0).
      norm_scale: norms have scales.
      norm_bias: norms have biases.
      norm_placement: `"pre"` norms what goes into attention and feed-forward, `"output"` what comes out of them (OLMo
        2), `"both"` both (Gemma 2); `"post"` norms the sum (BERT).
      first_norm: the first layer has a norm before attention.
      final_norm: there is a norm before the head.
      embed_norm: there is one after the embedding.
      parallel_block: attention and feed-forward read the same residual stream, side by side.
      shared_norm: and the same norm of it.
      qk_norm: queries and keys are normed before rotation: `"head"`, one scale for all heads; `"heads"`, one for each;
        `"whole"`, all heads together as one vector.
      qk_norm_bias: these norms have biases.

      embed_scale: what embeddings are multiplied by.
      embed_size: width of the embedding where it is projected to and from the residual stream; `None` where it is not.
      patches: the model reads images, cut into squares; `None` if it reads tokens.
      token_types: rows of a table of segment embeddings, which encoders add; 0 for none.
      learned_positions: rows of a table of position embeddings; 0 for none.
      position_offset: row of position 0.
      rotary_dim: how much of each head is rotated, from its start; `None` for all, 0 for none.
      rotary_interleaved: the pairs `(2i, 2i + 1)` are rotated (GPT-J), not `(i, i + rotary_dim / 2)`.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how those are stretched, or `None`.
      local_rope_theta: base in layers with a window, unstretched; `None` where it is the same.
      unrotated_layers: layers without rotation; empty for none.
      alibi_slopes: for each query head, what a score gains a position from query to key (arXiv 2108.12409).

      attention_bias: q, k and v have biases.
      attention_out_bias: the attention output has a bias.
      attention_scale: of the scores, default `1 / sqrt(head_dim)`.
      inverse_layer_scale: and layer `i` divides it by `i + 1`.
      attention_soft_cap: scores become `cap * tanh(score / cap)`.
      clip_qkv: queries, keys and values are clipped to plus and minus this.
      sinks: each head has one more score in its softmax, which has no value (gpt-oss).
      windows: sliding window of each layer in tokens, `None` for full attention; empty means full everywhere. A window
        of `w` lets a query see itself and the `w - 1` tokens before it (and after it, if not causal).
      latent: multi-head latent attention, or `None`.

      activation: of the feed-forward layer, or of its gate.
      gated: the feed-forward layer is `down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))`.
      mlp_bias: its projections have biases.
      experts: a mixture of experts in its place, or `None`.
      residual_multiplier: what the outputs of attention and feed-forward are multiplied by.

      lm_head: there is a head, which predicts tokens; else hidden states are all there is (see `dsjax.encode`).
      tie_embeddings: the head is the embedding.
      head_bias: the head has a bias.
      logit_scale: what logits are multiplied by.
      logit_soft_cap: logits become `cap * tanh(logit / cap)`.
      pooler: what stands for a whole text: `"tanh"`, a dense layer with tanh over the first token (BERT); `"end"`, the
        state of the first of `eos_ids`, or of the highest id where there are none (CLIP).
      projection_size: width that pooled states are projected to (CLIP), or `None`.
      bos_id: token that begins a text, or `None`.
      eos_ids: tokens that end a generation.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    causal: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_scale: bool = True
    norm_bias: bool = False
    norm_placement: Literal["pre", "post", "output", "both"] = "pre"
    first_norm: bool = True
    final_norm: bool = True
    embed_norm: bool = False
    parallel_block: bool = False
    shared_norm: bool = False
    qk_norm: Literal["head", "heads", "whole"] | None = None
    qk_norm_bias: bool = False
    embed_scale: float = 1.0
    embed_size: int | None = None
    patches: Patches | None = None
    token_types: int = 0
    learned_positions: int = 0
    position_offset: int = 0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    unrotated_layers: tuple[bool, ...] = ()
    alibi_slopes: tuple[float, ...] = ()
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_scale: float | None = None
    inverse_layer_scale: bool = False
    attention_soft_cap: float | None = None
    clip_qkv: float | None = None
    sinks: bool = False
    windows: tuple[int | None, ...] = ()
    latent: Latent | None = None
    activation: Activation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    experts: Experts | None = None
    residual_multiplier: float = 1.0
    lm_head: bool = True
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    pooler: Literal["tanh", "end"] | None = None
    projection_size: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        )
        for name in sizes if self.patches else ("vocab_size", *sizes):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.rotary_size % 2 or not 0 <= self.rotary_size <= self.head_dim:
            raise ConfigError(
                f"{self.rotary_size} of head_dim={self.head_dim} are rotated; rotary embedding needs pairs in a head"
            )
        for name in ("windows", "unrotated_layers"):
            values = getattr(self, name)
            if values and len(values) != self.num_layers:
                raise ConfigError(f"{name} names {len(values)} layers, the model has {self.num_layers}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"a sliding window must be at least 1 token, got {self.windows}")
        if self.alibi_slopes and len(self.alibi_slopes) != self.num_heads:
            raise ConfigError(
                f"alibi_slopes has {len(self.alibi_slopes)} entries, the model has {self.num_heads} heads"
            )
        if self.shared_norm and not self.parallel_block:
            raise ConfigError("shared_norm needs parallel_block: one after the other, each has a norm of its own")
        if self.parallel_block and self.norm_placement != "pre":
            raise ConfigError(f"parallel_block needs norm_placement='pre', not {self.norm_placement!r}")
        if self.experts and len(self.experts.layers) not in (0, self.num_layers):
            raise ConfigError(
                f"experts.layers names {len(self.experts.layers)} layers, the model has {self.num_layers}"
            )
        self._check_scaling()

    def _check_scaling(self):
        scaling, pairs = self.rope_scaling, self.rotary_size // 2
        if scaling is None:
            return
        for name in {"factors": ["factors"], "longrope": ["factors", "long_factors"]}.get(scaling.kind, []):
            count = len(getattr(scaling, name))
            if count != pairs:
                raise ConfigError(f"rope_scaling has {count} {name}, {pairs} pairs of a head are rotated")

    @property
    def rotary_size(self) -> int:
        """How much of each head is rotated."""
        if self.latent is not None:
            return self.latent.rope_size
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def require_head(self) -> None:
        """Check that the model predicts tokens, each from those before it.

        Raises:
          ConfigError: it only encodes; names the functions for that.
        """
        if not self.lm_head or not self.causal:
            encode = "encode" if self.patches is None else "encode_image"
            raise ConfigError(f"a {self.model_type} has no head that predicts the next token; see dsjax.{encode}")

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.hidden_size if self.embed_size is None else self.embed_size

    @property
    def scales_by_length(self) -> bool:
        """Rotary frequencies depend on how long a sequence may become."""
        return self.rope_scaling is not None and self.rope_scaling.kind in ("dynamic", "longrope")

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens, or `None`."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts."""
        return self.experts is not None and (not self.experts.layers or self.experts.layers[layer])

    def layer(self, index: int) -> Layer:
        """What sets one layer apart."""
        window = self.window(index)
        rotary = "local" if window is not None and self.local_rope_theta is not None else "global"
        if not self.rotary_size or (self.unrotated_layers and self.unrotated_layers[index]):
            rotary = None
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return Layer(
            window=window,
            rotary=rotary,
            scale=scale / (index + 1) if self.inverse_layer_scale else scale,
            experts=self.has_experts(index),
            attention_norm=self.norm_placement in ("pre", "both") and (self.first_norm or index > 0),
        )
