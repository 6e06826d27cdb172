"""Named real shapes: the experts of known models."""

from typing import NamedTuple


class Mixture(NamedTuple):
    """The experts of one layer.

    Attributes:
        count: of experts.
        per_token: how many a token chooses.
        model_dim: width of the residual stream.
        size: width of an expert.
        activation: of its gate.
    """

    count: int
    per_token: int
    model_dim: int
    size: int
    activation: str = "silu"

    def products(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of an expert's weights by name; gate and up are one."""
        return {"gate_up": (2 * self.size, self.model_dim), "down": (self.model_dim, self.size)}


MODELS = {
    "mixtral-8x7b": Mixture(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "gpt-oss-20b": Mixture(32, 4, 2880, 2880, "clamped_swiglu"),
    "gpt-oss-120b": Mixture(128, 4, 2880, 2880, "clamped_swiglu"),
    "deepseek-v3": Mixture(256, 8, 7168, 2048),
}
