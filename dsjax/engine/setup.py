"""What an engine is made of: parameters on their devices, and the sizes of its programs."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.engine.programs import Sizes
from dsjax.errors import ParameterError, RequestError
from dsjax.params import Params, flatten, leaf_sharding, logical_axes, unflatten, validate
from dsjax.ragged.groups import page_groups
from dsjax.ragged.pages import pages_dtype

if TYPE_CHECKING:
    from dsjax.tokenizer import Tokenizer


def placed(params: Params, mesh: jax.sharding.Mesh | None) -> Params:
    """The parameters spread over a mesh by their logical axes, or where they are."""
    if mesh is None:
        leaves = jax.tree.leaves(params)
        if all(isinstance(leaf, jax.Array) for leaf in leaves):
            return params
        return jax.tree.map(jnp.asarray, params)
    axes = logical_axes(params)
    leaves = {
        path: jax.device_put(leaf, leaf_sharding(leaf, axes[path], mesh)) for path, leaf in flatten(params).items()
    }
    return unflatten(leaves, params.config)


def choose_sizes(
    params: Params,
    tokenizer: "Tokenizer | None",
    *,
    slots: int | None,
    token_budget: int | None,
    page_size: int,
    max_context: int | None,
    steps_per_sync: int | None,
    kv_dtype: Any,
    prefix_caching: bool,
    split_fuse: bool,
    max_logprobs: int,
    implementation: str | None,
) -> Sizes:
    """Check what the caller asks for, and fill in the rest; `pages` comes from the memory plan."""
    config = params.config
    device = next(iter(jax.tree.leaves(params)[0].sharding.device_set))
    on_cpu = device.platform == "cpu"
    context = min(config.max_context, 8192) if max_context is None else max_context
    given = {
        "slots": (16 if on_cpu else 256) if slots is None else slots,
        "token_budget": token_budget,
        "page_size": page_size,
        "max_context": context,
        "steps_per_sync": (1 if on_cpu else 8) if steps_per_sync is None else steps_per_sync,
    }
    if token_budget is None:
        given["token_budget"] = max(64 if on_cpu else 512, given["slots"])
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise RequestError(f"{name} must be a whole number of at least 1, got {value!r}")
    if given["token_budget"] < given["slots"]:
        raise RequestError(
            f"token_budget={given['token_budget']} must be at least slots={given['slots']}, a token for each"
        )
    if context > config.max_context or context < 2:
        raise RequestError(f"max_context={context} must be from 2 to the model's {config.max_context}")
    if not 0 <= max_logprobs <= config.vocab_size:
        raise RequestError(f"max_logprobs={max_logprobs} must be from 0 to {config.vocab_size}, the model's vocabulary")
    if not split_fuse and given["token_budget"] < context:
        raise RequestError(
            f"without split_fuse a prompt is read whole: token_budget={given['token_budget']} must be at least "
            f"max_context={context}"
        )
    ends = len(config.eos_ids) + (0 if tokenizer is None else len(tokenizer.eos_ids))
    several = any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(params))
    return Sizes(
        **given,
        groups=page_groups(config, context - 1, page_size, given["token_budget"]),
        rows=2 * given["slots"],
        pages=0,
        packet_tokens=max(4 * given["token_budget"], 1024),
        packet_prompts=min(64, 2 * given["slots"]),
        stop_ids=-(-(ends + 16) // 8) * 8,
        biased_tokens=min(512, config.vocab_size),
        alternatives=max_logprobs,
        kv_dtype=pages_dtype(kv_dtype, params),
        prefix_caching=prefix_caching,
        split_fuse=split_fuse,
        always_full=on_cpu,
        implementation=implementation or ("xla" if several else None),
    )


def check_same(old: Params, new: Params) -> None:
    """Check that new parameters run in the programs that were compiled for old ones.

    Raises:
      ParameterError: names the first leaf that does not fit.
    """
    validate(new)
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ParameterError("the new parameters have another structure, or another config, than the engine's")
    for path, one in flatten(old).items():
        other = flatten(new)[path]
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ParameterError(
                    f"leaf '{path}' is {b.dtype}{list(b.shape)}, the engine's is {a.dtype}{list(a.shape)}"
                )
            if isinstance(b, jax.Array) and not a.sharding.is_equivalent_to(b.sharding, a.ndim):
                raise ParameterError(f"leaf '{path}' is on other devices than the engine's; move it: jax.device_put")
