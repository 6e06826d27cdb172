"""The frozen description of a model: everything about an architecture that is not a weight."""

import dataclasses
from typing import Literal

from dsjax.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    Attributes:
      kind: `"linear"` divides every frequency by `factor` (position interpolation, arXiv 2306.15595). `"llama3"`
        divides only those whose wavelength exceeds the original context, with a smooth ramp between (Llama 3.1).
        `"factors"` divides frequency `i` by `factors[i]` (what GGUF files store).
      factor: the divisor of `"linear"` and `"llama3"`.
      low_freq_factor: `"llama3"`: wavelengths above `original_context / low_freq_factor` are divided whole.
      high_freq_factor: `"llama3"`: wavelengths below `original_context / high_freq_factor` stay as they are.
      original_context: `"llama3"`: the context length of pre-training, in tokens.
      factors: `"factors"`: `head_dim / 2` divisors.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the transformer computes, as hashable data; it is static metadata of the parameter tree.

    Attributes:
      model_type: the family's name as Hugging Face spells it, for messages and for writing checkpoints back.
      vocab_size: rows of the embedding (V).
      hidden_size: width of the residual stream (D).
      intermediate_size: width of the gated feed-forward layer, or of one of its experts (F).
      num_layers: transformer layers (L).
      num_heads: query heads (N).
      num_kv_heads: key/value heads (K); divides `num_heads`.
      head_dim: size of one head (H); even, and `num_heads * head_dim` need not equal `hidden_size`.
      max_context: longest sequence in tokens that the model was made for.
      norm_eps: epsilon of every RMS norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how those are stretched, or `None`.
      activation: of the feed-forward gate.
      attention_bias: q, k and v have biases.
      attention_out_bias: the attention output has a bias.
      mlp_bias: gate, up and down have biases.
      qk_norm: every head of q and k has an RMS norm before it is rotated; one scale for all heads of a kind.
      tie_embeddings: the head is the embedding.
      windows: sliding window of each layer in tokens, `None` for full attention; empty means full everywhere. A window
        of `w` lets a query see itself and the `w - 1` tokens before it.
      num_experts: feed-forward networks of a layer that a router chooses from (E); 0 for one that all tokens share.
      experts_per_token: how many the router chooses.
      renormalize_experts: the weights of those chosen add up to 1; else they are their probabilities among all.
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
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "silu"
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    renormalize_experts: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(f"windows names {len(self.windows)} layers, the model has {self.num_layers}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(f"a sliding window must be at least 1 token, got {self.windows}")
        if not (self.num_experts == self.experts_per_token == 0 or 1 <= self.experts_per_token <= self.num_experts):
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} does not fit num_experts={self.num_experts}; give 1 to "
                "num_experts, or 0 for both"
            )
        if self.num_experts and self.mlp_bias:
            raise ConfigError("mlp_bias is not supported for experts")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ConfigError(f"rope_scaling has {len(scaling.factors)} factors, head_dim={self.head_dim} needs half")

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens, or `None`."""
        return self.windows[layer] if self.windows else None
