"""Real shapes: the attention of known models, and the batches of DeepSpeed's own test-suite."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The attention of a model's layer; where layers differ, of the one that has most features."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A ragged batch: new tokens and tokens already in the pages, for each slot."""

    attention: AttentionShape
    new_and_seen: tuple[tuple[int, int], ...]
    page_size: int
    scale: float | None = None

    @property
    def q_lens(self) -> list[int]:
        """Queries of each slot."""
        return [new for new, _ in self.new_and_seen]

    @property
    def kv_lens(self) -> list[int]:
        """Keys of each slot once its new tokens are written."""
        return [new + seen for new, seen in self.new_and_seen]


MODELS: dict[str, AttentionShape] = {
    "smollm2-135m": AttentionShape(9, 3, 64),
    "qwen3-0.6b": AttentionShape(16, 8, 128),
    "llama-3.2-1b": AttentionShape(32, 8, 64),
    "llama-3.1-8b": AttentionShape(32, 8, 128),
    "gemma-2-9b": AttentionShape(16, 8, 256, window=4096, soft_cap=50.0),
    "qwen3-30b-a3b": AttentionShape(32, 4, 128),
    "mixtral-8x7b": AttentionShape(32, 8, 128),
    "gpt-oss-20b": AttentionShape(64, 8, 64, window=128, sinks=True),
    "llama-3.3-70b": AttentionShape(64, 8, 128),
    "llama-3.1-405b": AttentionShape(128, 8, 128),
    "falcon-7b": AttentionShape(71, 1, 64),
    "bert-base": AttentionShape(12, 12, 64, causal=False),
}


def _deepspeed(heads: int, kv_heads: int, head_dim: int, *new_and_seen: tuple[int, int]) -> BatchShape:
    page_size = 128 if head_dim <= 64 else 64  # as the original's attention chooses its blocks
    return BatchShape(AttentionShape(heads, kv_heads, head_dim), new_and_seen, page_size, scale=1.0)


_MIXED = ((332, 628), (1, 718), (1, 323), (180, 5), (224, 0))

# `tests/unit/inference/v2/kernels/ragged_ops/test_blocked_flash.py` of DeepSpeed.
DEEPSPEED: dict[str, BatchShape] = (
    {f"prompt-{new}": _deepspeed(16, 16, 64, (new, 0)) for new in (2, 33, 65, 128, 256, 2037)}
    | {
        "prompts-" + "-".join(map(str, lengths)): _deepspeed(16, 16, 64, *((new, 0) for new in lengths))
        for lengths in ((128, 128), (192, 38), (514, 713), (83, 312, 610))
    }
    | {
        f"continuation-{new}-{seen}": _deepspeed(32, 32, 64, (new, seen))
        for new, seen in ((1, 34), (43, 40), (1, 144), (64, 128), (332, 628))
    }
    | {f"mixed-head-{head_dim}": _deepspeed(16, 16, head_dim, *_MIXED) for head_dim in (64, 128)}
    | {
        f"mixed-gqa-{heads}-{kv_heads}": _deepspeed(heads, kv_heads, 128, *_MIXED)
        for heads, kv_heads in ((32, 8), (64, 16), (40, 8))
    }
)

# Relative and absolute, by dtype: the original compares with plain PyTorch within these.
DEEPSPEED_TOLERANCES: dict[str, tuple[float, float]] = {
    "float32": (5e-4, 5e-5),
    "float16": (3e-2, 2e-3),
    "bfloat16": (4.8e-1, 3.2e-2),
}
