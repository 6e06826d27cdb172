"""Which experts a token goes to, and with what weights, from the router's logits."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch

OP = "choose_experts"
MAX_EXPERTS = 1024  # of the kernel, which holds a row of them in the registers of one warp or a few
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    Attributes:
      per_token: how many (k); of equally good ones the lower number comes first.
      score: of an expert: `"softmax"` over all logits, or `"sigmoid"` of its own (DeepSeek-V3, arXiv 2412.19437).
      groups: experts are in so many groups, and only those of the best ones can be chosen.
      groups_per_token: how many groups those are.
      group_score: of a group: its best expert's, or the sum of its two best (`"top2"`).
      renormalize: the weights of those chosen add up to 1; else they are their scores.
      scale: what weights are multiplied by in the end.
    """

    per_token: int
    score: str = "softmax"
    groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self):
        if self.score not in SCORES or self.group_score not in GROUP_SCORES:
            raise ValueError(
                f"score={self.score!r} must be one of {SCORES}, group_score={self.group_score!r} of {GROUP_SCORES}"
            )


def choose_experts(
    logits: Float[Array, "*s T E"],
    routing: Routing,
    *,
    bias: Float[Array, "E"] | None = None,
    correction: Float[Array, "E"] | None = None,
    implementation: str | None = None,
) -> tuple[Float32[Array, "T k"], Int32[Array, "T k"]]:
    """Choose the experts of each token, as `top_k` over their scores would.

    Args:
      logits: of the router, or parts of them whose sum they are, as `few_row_matmul` gives them.
      routing: how to choose.
      bias: added to the logits.
      correction: added to the scores for choosing, not for weighting (arXiv 2408.15664).
      implementation: `"triton"`, one launch; or `"xla"`, which is differentiable; `None` for the best that can run.

    Returns:
      Weights in float32, and the numbers of the experts.

    Raises:
      ValueError: shapes and options do not fit each other, or the backend can not run; the message says why.
    """
    num_experts = logits.shape[-1]
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits {logits.shape} must be [T, E], or [s, T, E] in parts")
    if num_experts % routing.groups or not 1 <= routing.groups_per_token <= routing.groups:
        raise ValueError(
            f"{num_experts} experts can not be in {routing.groups} groups, {routing.groups_per_token} a token"
        )
    if not 1 <= routing.per_token <= num_experts // routing.groups * routing.groups_per_token:
        raise ValueError(
            f"{routing.per_token} experts a token are more than the {num_experts} there are, or its groups"
        )
    for name, each in (("bias", bias), ("correction", correction)):
        if each is not None and each.shape != (num_experts,):
            raise ValueError(f"{name} {each.shape} must have an entry for each of the {num_experts} experts")
    gpu = dispatch.current_gpu()
    reasons = dispatch.triton_refusals(gpu)
    if num_experts > MAX_EXPERTS:
        reasons.append(f"there are {num_experts} experts; the kernel is for at most {MAX_EXPERTS}")
    if not logits.size:
        reasons.append(f"logits {logits.shape} are empty, and Triton can not launch an empty grid")
    parts = logits if logits.ndim == 3 else logits[None]
    with jax.named_scope(OP):
        if dispatch.choose(OP, {"triton": reasons, "xla": []}, implementation, gpu) == "triton":
            return importlib.import_module(f"{__package__}.routing_triton").choose(parts, routing, bias, correction)
        return _choose(parts.astype(jnp.float32).sum(axis=0), routing, bias, correction)


def _choose(logits, routing: Routing, bias, correction):
    if bias is not None:
        logits += bias.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if routing.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    preference = scores if correction is None else scores + correction.astype(jnp.float32)
    if routing.groups > 1:
        preference = _within_groups(preference, routing)
    weights, chosen = lax.top_k(preference, routing.per_token)
    if preference is not scores:
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if routing.renormalize:
        weights /= weights.sum(axis=-1, keepdims=True)
    return (weights if routing.scale == 1.0 else weights * routing.scale), chosen


def _within_groups(preference, routing: Routing):
    """Minus infinity for experts outside of each token's best groups."""
    grouped = preference.reshape(preference.shape[0], routing.groups, -1)
    best = lax.top_k(grouped, 1 if routing.group_score == "max" else 2)[0].sum(axis=-1)
    groups = lax.top_k(best, routing.groups_per_token)[1]
    allowed = jax.nn.one_hot(groups, routing.groups, dtype=bool).any(axis=1)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(preference.shape)
