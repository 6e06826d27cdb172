"""Trees of other libraries by a map of names, stacked layers and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.errors import ParameterError
from dsjax.params import flatten
from policies.trees import from_tree

# As MaxText names and lays out a model whose layers were scanned along axis 1.
SCANNED = {
    "embed.weight": "token_embedder.embedding",
    "layers.{i}.attention_norm.scale": "decoder.layers.pre_self_attention_layer_norm.scale[:, {i}]",
    "layers.{i}.mlp_norm.scale": "decoder.layers.post_self_attention_layer_norm.scale[:, {i}]",
    "final_norm.scale": "decoder.decoder_norm.scale",
    "head.weight": ("decoder.logits_dense.kernel", jnp.transpose),
    "layers.{i}.mlp.gate.weight": ("decoder.layers.mlp.wi_0.kernel[:, {i}]", jnp.transpose),
    "layers.{i}.mlp.up.weight": ("decoder.layers.mlp.wi_1.kernel[:, {i}]", jnp.transpose),
    "layers.{i}.mlp.down.weight": ("decoder.layers.mlp.wo.kernel[:, {i}]", jnp.transpose),
    "layers.{i}.attention.out.weight": (
        "decoder.layers.self_attention.out.kernel[:, {i}]",
        lambda kernel: kernel.reshape(-1, kernel.shape[-1]).T,
    ),
    **{
        f"layers.{{i}}.attention.{part}.weight": (
            f"decoder.layers.self_attention.{name}.kernel[:, {{i}}]",
            lambda kernel: kernel.reshape(kernel.shape[0], -1).T,
        )
        for part, name in (("q", "query"), ("k", "key"), ("v", "value"))
    },
}


def scanned(params):
    """The same weights laid out so, by numpy."""
    config, leaves = params.config, {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    def stack(path, shape=None):
        layers = [leaves[f"layers.{i}.{path}"] for i in range(config.num_layers)]
        kernels = [layer.T if layer.ndim == 2 else layer for layer in layers]
        return np.stack([kernel if shape is None else kernel.reshape(shape) for kernel in kernels], axis=1)

    def kernel(path, *shape):
        return {"kernel": stack(path, shape or None)}

    width = config.hidden_size
    attention = {
        "query": kernel("attention.q.weight", width, config.num_heads, config.head_dim),
        "key": kernel("attention.k.weight", width, config.num_kv_heads, config.head_dim),
        "value": kernel("attention.v.weight", width, config.num_kv_heads, config.head_dim),
        "out": kernel("attention.out.weight", config.num_heads, config.head_dim, width),
    }
    mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    layers = {
        "pre_self_attention_layer_norm": {"scale": stack("attention_norm.scale")},
        "post_self_attention_layer_norm": {"scale": stack("mlp_norm.scale")},
        "self_attention": attention,
        "mlp": {name: kernel(f"mlp.{part}.weight") for name, part in mlp.items()},
    }
    return {
        "token_embedder": {"embedding": leaves["embed.weight"]},
        "decoder": {
            "layers": layers,
            "decoder_norm": {"scale": leaves["final_norm.scale"]},
            "logits_dense": {"kernel": leaves["head.weight"].T},
        },
    }


def same(ours, theirs):
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))


def test_scanned_layers_also_under_jit(tiny_params):
    tree = scanned(tiny_params)
    same(from_tree(tree, tiny_params.config, SCANNED), tiny_params)
    same(jax.jit(lambda tree: from_tree(tree, tiny_params.config, SCANNED))(tree), tiny_params)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
        self.kv = nnx.Param(jnp.arange(2 * 32 * 32.0).reshape(2, 32, 32))
        self.out = nnx.Linear(64, 32, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(32, rngs=rngs) for _ in range(2)])
        self.gate, self.up = (nnx.Linear(32, 48, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(48, 32, use_bias=False, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(97, 32, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 97, use_bias=False, rngs=rngs)
        self.steps = nnx.Variable(jnp.zeros(()))


NNX = {
    "embed.weight": "embed.embedding",
    "layers.{i}.attention_norm.scale": "blocks.{i}.norms.0.scale",
    "layers.{i}.mlp_norm.scale": "blocks.{i}.norms.1.scale",
    "layers.{i}.attention.k.weight": "blocks.{i}.kv[0]",
    "layers.{i}.attention.v.weight": "blocks.{i}.kv[1]",
    "final_norm.scale": "norm.scale",
    "head.weight": ("head.kernel", jnp.transpose),
    **{
        f"layers.{{i}}.{path}.weight": (f"blocks.{{i}}.{path.split('.')[1]}.kernel", jnp.transpose)
        for path in ("attention.q", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
    },
}


@pytest.mark.parametrize("form", ["module", "state", "pure"])
def test_nnx(tiny_config, form):
    model = Model(nnx.Rngs(0))
    state = nnx.state(model)
    tree = {"module": model, "state": state, "pure": nnx.to_pure_dict(state)}[form]
    leaves = flatten(from_tree(tree, tiny_config, NNX, ignored=[r"steps", r"rngs\..*"]))
    np.testing.assert_array_equal(leaves["embed.weight"], model.embed.embedding[...])
    np.testing.assert_array_equal(leaves["layers.1.attention.v.weight"], model.blocks[1].kv[...][1])
    np.testing.assert_array_equal(leaves["layers.1.mlp.down.weight"], model.blocks[1].down.kernel[...].T)


def test_one_layer_can_differ(tiny_params):
    tree = scanned(tiny_params)
    tree["first"] = np.full((32,), 7.0)
    params = from_tree(tree, tiny_params.config, SCANNED | {"layers.0.mlp_norm.scale": "first"})
    assert params["layers"]["0"]["mlp_norm"]["scale"][0] == 7
    assert params["layers"]["1"]["mlp_norm"]["scale"][0] == tiny_params["layers"]["1"]["mlp_norm"]["scale"][0]


def test_all_problems_come_in_one_error(tiny_params):
    tree = scanned(tiny_params)
    tree["extra"] = np.zeros((2, 3))
    tree["decoder"]["decoder_norm"]["scale"] = np.zeros(31)
    del tree["token_embedder"]
    names = SCANNED | {
        "layers.{i}.mlp.sideways.weight": "extra",
        "layers.{i}.mlp_norm.scale": "decoder.layers.post_self_attention_layer_norm.scale[:, 2]",
        "layers.{i}.mlp.down.weight": ("decoder.layers.mlp.wo.kernel[:, {i}]", lambda kernel: kernel.reshape(5, 5)),
    }
    del names["head.weight"]
    with pytest.raises(ParameterError) as error:
        from_tree(jax.tree.map(jnp.asarray, tree), tiny_params.config, names)
    for message in (
        "names has 'layers.{i}.mlp.sideways.weight', which a model of this config lacks",
        "leaf 'embed.weight' should come from 'token_embedder.embedding', which the tree lacks",
        "names has no path for leaf 'head.weight' [97, 32]",
        "leaf 'final_norm.scale' should have shape [32], from 'decoder.decoder_norm.scale' it has [31]",
        "'extra' [2, 3] in the tree is used by no leaf",
        "leaf 'layers.1.mlp_norm.scale' can not be made from 'decoder.layers.post_self_attention_layer_norm.scale[:",
        "leaf 'layers.0.mlp.down.weight' can not be made from 'decoder.layers.mlp.wo.kernel[:, 0]': ",
    ):
        assert message in str(error.value)


def test_logits_through_the_tree(tiny_params):
    tokens = [[1, 2, 3, 4]]
    tree = jax.tree.map(jnp.asarray, scanned(tiny_params))
    ours = dsjax.logits(from_tree(tree, tiny_params.config, SCANNED), tokens)
    np.testing.assert_array_equal(ours, dsjax.logits(tiny_params, tokens))
