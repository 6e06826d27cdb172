"""Sharding is names: one table maps the logical axes of parameters and state to the axes of a mesh."""

from collections.abc import Mapping, Sequence

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Tensor parallelism as in Megatron-LM: heads, feed-forward width and vocabulary are split, the residual stream is not.
RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    "head": None,
    "positions": None,
    "rank": None,
    # Each device holds a slice of every expert, so that they are equally busy whichever the router chooses.
    "experts": None,
}


def named_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Where an array with these logical axes lives on a mesh.

    An axis is split only when the mesh has the axis that the table names and its size divides the array's; any other is
    replicated, so the same tree fits every mesh.

    Args:
      mesh: device mesh; the axis called `"tensor"` is the one that weights are split over.
      axes: logical name of each array axis.
      shape: size of each array axis.

    Returns:
      The sharding.
    """
    spec = [
        rule if (rule := RULES[name]) in mesh.shape and size % mesh.shape[rule] == 0 else None
        for name, size in zip(axes, shape, strict=True)
    ]
    # The compiler propagates shardings from here: nothing below spells out those of intermediate arrays.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(auto, PartitionSpec(*spec))
