"""The quantized leaf as an array: rows, joins, inputs of its own, transformations, devices and files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_in_numpy import dequantized
from jax.sharding import NamedSharding, PartitionSpec

import dsjax
from dsjax.params import flatten, leaf_sharding, logical_axes, unflatten, validate
from dsjax.quantization import SCHEMES, QuantizedArray, quantize_array, scheme

# One of each way in which scales are laid out.
KINDS = ["q4_1", "int8", "int4_asym_g64", "fp6", "fp8_e4m3_block", "fp8_e4m3_tensor", "mxfp4", "nvfp4"]
LAYOUTS = ["q4_1", "fp8_e4m3_block", "fp8_e4m3_tensor", "nvfp4"]
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
read = quick(QuantizedArray.dequantize, static_argnames="dtype")


def make(name, rng, shape=(160, 192)):
    """A leaf of random bytes."""
    to = scheme(name)

    def part(name, wanted):
        if name == "values" or wanted.dtype == jnp.uint8:
            low, high = (118, 130) if name == "scales" else (0, 120)
            return jnp.asarray(rng.integers(low, high, wanted.shape), jnp.uint8).view(wanted.dtype)
        return jnp.asarray(rng.uniform(0.01, 0.02, wanted.shape), wanted.dtype)

    parts = {name: part(name, wanted) for name, wanted in to.parts(shape).items()}
    return QuantizedArray(**{"minimums": None, **parts}, scheme=to, dtype=jnp.dtype("float32"))


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_it_reads_as_an_array(name, rng):
    leaf = make(name, rng)
    whole = dequantized(leaf)
    assert leaf.shape == whole.shape and leaf.ndim == 2 and leaf.size == whole.size
    same(read(leaf), whole)
    assert jax.eval_shape(read, leaf.astype(jnp.bfloat16)).dtype == read(leaf, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert leaf.nbytes == sum(array.nbytes for array in jax.tree.leaves(leaf)) == leaf.scheme.nbytes(leaf.shape)
    assert repr(leaf) == f"QuantizedArray({name}, [160, 192], float32, {leaf.nbytes:,} B)"


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows(name, rng):
    leaf = make(name, rng)
    whole, rows = dequantized(leaf), np.array([150, 3, 3])

    @quick
    def parts(leaf):
        experts = jax.tree.map(lambda part: jnp.stack([part, part]), leaf)
        assert experts.shape == (2, 160, 192)
        pieces = leaf[rows], leaf[130:140], leaf[rows[:, None]], experts[1], experts[0, rows]
        every = jax.vmap(QuantizedArray.dequantize)(experts)
        return [piece.dequantize() for piece in pieces], every

    found, every = parts(leaf)
    for piece, wanted in zip(found, (rows, slice(130, 140), rows[:, None], slice(None), rows), strict=True):
        same(piece, whole[wanted])
    same(every, [whole, whole])


def test_rows_of_numpy_arrays_are_numpy_arrays(rng):
    leaf = jax.tree.map(np.asarray, make("fp8_e4m3_block", rng))
    rows = leaf[np.arange(140)]
    assert all(isinstance(part, np.ndarray) for part in (*jax.tree.leaves(rows), *jax.tree.leaves(leaf[4:9])))
    np.testing.assert_array_equal(dequantized(rows), dequantized(leaf)[:140])
    same(leaf.dequantize(), dequantized(leaf))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [128, 160])
def test_joining(name, rows, rng):
    pieces = [make(name, rng, (rows, 192)), make(name, rng, (48, 192))]
    joined, whole = quick(lambda *pieces: (one := QuantizedArray.concatenate(list(pieces)), one.dequantize()))(*pieces)
    assert joined.shape == (rows + 48, 192)
    same(whole, np.concatenate([dequantized(piece) for piece in pieces]))
    if rows == 128 and "tensor" not in name:
        assert joined.scheme == pieces[0].scheme  # blocks that line up stay blocks


def test_what_scales_of_rows_are_called(rng):
    assert make("fp8_e4m3_tensor", rng).with_scales_of_rows().scheme is SCHEMES["fp8_e4m3"]
    assert make("int4", rng).with_scales_of_rows().scheme is SCHEMES["int4"]


def test_inputs_of_its_own(rng):
    leaf, x = make("int4_asym_g64", rng), rng.standard_normal((5, 192)).astype(np.float32)
    order, scale = rng.permutation(192), rng.uniform(0.5, 2, 192).astype(np.float32)
    changed = dataclasses.replace(leaf, permutation=jnp.asarray(order), input_scale=jnp.asarray(scale))
    weight = np.empty((160, 192))
    weight[:, order] = dequantized(leaf)
    same(read(changed), weight / scale)
    product = quick(lambda leaf, x: leaf.inputs(x) @ leaf.stored().T)(changed, x)
    np.testing.assert_allclose(product, x @ (weight / scale).T, rtol=1e-4, atol=1e-5)
    assert changed.has_own_inputs and not leaf.has_own_inputs
    same(read(changed[np.array([9, 4])]), (weight / scale)[[9, 4]])
    experts = jax.tree.map(lambda part: part[None], changed)
    same(read(experts)[0], weight / scale)
    assert repr(changed).endswith("B, permutation, input_scale)")


def test_it_is_a_pytree(rng):
    leaf = make("nvfp4", rng)
    values = np.array(leaf.values)
    doubled = jax.jit(lambda leaf: jax.tree.map(lambda part: part * 2, leaf), donate_argnums=0)(leaf)
    assert doubled.scheme is leaf.scheme and leaf.values.is_deleted()
    np.testing.assert_array_equal(doubled.values, values * 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(doubled)]
    assert paths == [".values", ".scales", ".tensor_scale"]


@pytest.mark.parametrize("name", ["q4_1", "fp8_e4m3_block", "nvfp4", "int8 with its own inputs"])
def test_on_devices(name, rng):
    """Along either axis, no group is cut in two, and what all share is everywhere."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    leaf, spec = make(name.split()[0], rng, (256, 384)), PartitionSpec
    if "own" in name:
        leaf = dataclasses.replace(leaf, permutation=jnp.arange(384)[::-1], input_scale=jnp.full(384, 2.0))
    for axes, wanted in ((("mlp", "embed"), spec("tensor", None)), (("embed", "mlp"), spec(None, "tensor"))):
        if "block" in name and axes[1] == "mlp":
            wanted = spec(None, None)  # three blocks are not for two devices
        placed = jax.device_put(leaf, leaf_sharding(leaf, axes, mesh))
        assert placed.values.sharding.is_equivalent_to(NamedSharding(mesh, wanted), 2)
        for part, array in placed.parts():
            if part in ("permutation", "input_scale"):
                kept = spec(wanted[1])
            else:
                kept = spec(*(axis if size > 1 else None for axis, size in zip(wanted, array.shape, strict=True)))
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, kept), array.ndim), part
        np.testing.assert_array_equal(read(placed), read(leaf))
    odd = make("int4", rng, (8, 96))
    assert leaf_sharding(odd, ("embed", "mlp"), mesh).values.spec == spec(None, None)  # a run of 32 stays whole
    assert leaf_sharding(odd, ("embed", "mlp"), None) is None


def test_saved_and_restored(tiny_config, tmp_path, rng):
    odd = scheme("int4", group_size=16, symmetric=False, scale_dtype="float16")
    kinds = {"q": "nvfp4", "k": "fp8_e4m3_block", "v": "fp8_e4m3_tensor", "out": "int4_asym_g64", "up": "mxfp4"}
    kinds |= {"gate": odd, "head": "int8"}
    leaves = flatten(dsjax.init(tiny_config, jax.random.key(0)))
    for path, leaf in leaves.items():
        if to := kinds.get(path.split(".")[-2]):
            leaves[path] = make(to, rng, leaf.shape)
    order = jnp.asarray(rng.permutation(64), jnp.int32)
    own = dataclasses.replace(leaves["layers.1.attention.out.weight"], permutation=order, input_scale=jnp.ones(64))
    tree = unflatten(leaves | {"layers.1.attention.out.weight": own}, tiny_config)
    assert odd.name not in SCHEMES
    tiled = unflatten(
        {path: leaf.tiled() if ".out." in path else leaf for path, leaf in flatten(tree).items()}, tiny_config
    )
    assert flatten(tiled)["layers.0.attention.out.weight"].layout == "tiles"
    dsjax.save(tiled, tmp_path / "model")  # in rows: a file is not for one kernel
    back = dsjax.restore(tmp_path / "model")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_weights_with_inputs_of_their_own_stay_apart(tiny_params, rng):
    leaves = flatten(tiny_params)
    path = "layers.1.attention.k.weight"
    own = quantize_array(leaves[path], "int8")
    own = dataclasses.replace(own, permutation=jnp.asarray(rng.permutation(32), jnp.int32))
    tree = unflatten(leaves | {path: own}, tiny_params.config)
    ready = jax.jit(dsjax.prepare)(tree)
    validate(ready)
    paths = flatten(ready).keys()
    assert {"layers.0.attention.qkv.weight", "layers.1.attention.q.weight", path} <= paths
    assert logical_axes(ready)[path] == ("kv_heads", "embed")


@pytest.mark.parametrize("name", ["int4_asym_g64", "nvfp4", "fp8_e4m3_block"])
def test_tiles_are_the_same_weight(name, rng):
    leaf = make(name, rng, (256, 512))
    whole, rows = dequantized(leaf), np.array([[250, 3], [3, 0]])
    other = make(name, rng, (144, 512))

    @quick
    def parts(leaf, other):
        tiled = leaf.tiled(shards=2)
        joined = QuantizedArray.concatenate([tiled, other.tiled(shards=2)])
        stacked = jax.tree.map(lambda part: jnp.stack([part, part]), tiled)
        reads = [one.dequantize() for one in (tiled, tiled[rows], joined, stacked[1], stacked[1, rows])]
        return tiled, reads, tiled.in_rows()

    tiled, reads, back = parts(leaf, other)
    for found, wanted in zip(
        reads, (whole, whole[rows], np.concatenate([whole, dequantized(other)]), whole, whole[rows]), strict=True
    ):
        same(found, wanted)
    assert tiled.layout == "tiles" and tiled.tiled() is tiled and repr(tiled).endswith("B, tiles)")
    assert (tiled.shape, tiled.ndim, tiled.size, tiled.nbytes) == (leaf.shape, 2, leaf.size, leaf.nbytes)
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    jax.tree.map(np.testing.assert_array_equal, back, leaf)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    for axes, axis in ((("mlp", "embed"), 1), (("embed", "mlp"), 0)):
        placed = jax.device_put(tiled, leaf_sharding(tiled, axes, mesh))
        assert placed.values.sharding.shard_shape(placed.values.shape)[axis] * 2 == placed.values.shape[axis]
        small = placed.scales.sharding.shard_shape(placed.scales.shape)[axis]
        assert small * 2 == placed.scales.shape[axis] or small == 1
        jax.tree.map(np.testing.assert_array_equal, placed, tiled)
    assert make("int4", rng, (8, 96)).tiled().layout == "rows"  # no whole tile
