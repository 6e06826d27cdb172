"""Saved trees: equal bit for bit when they come back, and never half there."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

import dsjax
from dsjax import checkpoint
from dsjax.checkpoint import MANIFEST, config_from_json, config_to_json, restore, save, saved_folder, saved_shapes
from dsjax.config import Experts, ModelConfig, RopeScaling
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import flatten, unflatten, validate
from dsjax.quantization import SCHEMES, QuantizedArray
from dsjax.sharding import named_sharding
from dsjax.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def mixed(tiny_params):
    """A tree with leaves of every scheme, of two dtypes, and one in numpy."""
    rng, schemes = np.random.default_rng(0), list(SCHEMES.values())
    leaves = flatten(tiny_params)
    for i, (path, leaf) in enumerate(leaves.items()):
        if path.endswith(".weight") and ".attention." in path:
            scheme = schemes[i % 3]
            groups = (*leaf.shape[:-1], leaf.shape[-1] // scheme.group_size)
            values = rng.integers(-128, 128, (*leaf.shape[:-1], leaf.shape[-1] * scheme.bits // 8))
            leaves[path] = QuantizedArray(
                values=jnp.asarray(values, jnp.int8).view(jnp.uint8 if scheme.bits == 4 else jnp.int8),
                scales=jnp.asarray(rng.uniform(0.001, 0.02, groups), jnp.float16),
                minimums=jnp.asarray(rng.uniform(-0.1, 0, groups), jnp.float16) if scheme.has_minimum else None,
                scheme=scheme,
                dtype=jnp.dtype("bfloat16"),
            )
        elif path.endswith(".weight"):
            leaves[path] = leaf.astype(jnp.bfloat16)
    leaves["final_norm.scale"] = np.asarray(leaves["final_norm.scale"])
    return unflatten(leaves, tiny_params.config)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("tensor",))


@pytest.fixture
def saved(tmp_path, tiny_params):
    save(tiny_params, tmp_path / "model")
    return tmp_path / "model"


def assert_same(restored, params):
    """Equal in bits, dtypes, structure and config."""
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert restored.config == params.config and hash(restored.config) == hash(params.config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, params)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def everything(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("fused", [False, True])
def test_round_trip(tmp_path, tiny_params, mixed, fused):
    for name, params in {"plain": tiny_params, "mixed": mixed}.items():
        params = dsjax.prepare(params) if fused else params
        save(params, str(tmp_path / "made" / name))
        assert_same(restore(str(tmp_path / "made" / name)), params)
        assert saved_shapes(tmp_path / "made" / name).config == params.config
    assert sorted(os.listdir(tmp_path / "made")) == ["mixed", "plain"]


def test_special_values_keep_their_bits(tmp_path, tiny_params):
    bits = np.arange(2**16, dtype=np.uint16)  # every bfloat16: NaNs with payloads, both zeros, subnormals
    config = dataclasses.replace(tiny_params.config, vocab_size=2**11)
    params = dsjax.init(config, jax.random.key(1), jnp.bfloat16)
    params["embed"]["weight"] = jnp.asarray(bits.reshape(2**11, 32).view(jnp.bfloat16))
    save(params, tmp_path / "model")
    restored = restore(tmp_path / "model", only="embed.weight")["embed"]["weight"]
    np.testing.assert_array_equal(np.asarray(restored).view(np.uint16).ravel(), bits)


def test_programs_run_the_restored_tree_without_compiling_anew(saved, tiny_params):
    compiled = jax.jit(lambda params: dsjax.logits(params, np.arange(8, dtype=np.int32)[None]))
    expected = compiled(tiny_params)
    np.testing.assert_array_equal(compiled(restore(saved)), expected)
    assert compiled._cache_size() == 1


def test_another_dtype(tmp_path, mixed, mesh):
    save(mixed, tmp_path / "model")
    expected = flatten(mixed)
    for restored in (
        restore(tmp_path / "model", dtype="float16"),
        restore(tmp_path / "model", dtype="float16", mesh=mesh),
    ):
        validate(restored)
        for path, leaf in flatten(restored).items():
            assert leaf.dtype == jnp.float16
            chex.assert_trees_all_equal(leaf, expected[path].astype(jnp.float16))
    for dtype in ("int8", "float17"):
        with pytest.raises(ConfigError, match=dtype):
            restore(tmp_path / "model", dtype=dtype)


@pytest.mark.parametrize("fused", [False, True])
def test_meshes(tmp_path, mixed, mesh, fused):
    mixed = dsjax.prepare(mixed) if fused else mixed
    save(mixed, tmp_path / "one")
    spread = restore(tmp_path / "one", mesh=mesh)
    assert_same(spread, mixed)
    axes = dsjax.params.logical_axes(mixed)
    split = 0
    for path, leaf in flatten(spread).items():
        for part in jax.tree.leaves(leaf):
            assert part.sharding == named_sharding(mesh, axes[path], part.shape), path
            split += not part.sharding.is_fully_replicated
    assert split > 6
    save(spread, tmp_path / "two")
    assert_same(restore(tmp_path / "two"), mixed)
    assert_same(restore(tmp_path / "two", mesh=jax.make_mesh((1,), ("tensor",), devices=jax.devices()[1:])), mixed)


def test_leaves_are_read_in_groups(monkeypatch, saved, tiny_params):
    calls, read = [], checkpoint._read_arrays
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 20_000)
    monkeypatch.setattr(checkpoint, "_read_arrays", lambda folder, group: calls.append(group) or read(folder, group))
    assert_same(restore(saved), tiny_params)
    sizes = [sum(leaf.size * 4 for leaf in group.values()) for group in calls]
    assert len(calls) > 3 and all(size <= 20_000 or len(group) == 1 for size, group in zip(sizes, calls, strict=True))


def test_a_part(saved, tiny_params):
    part = restore(saved, only=["layers.1.*", "embed.*"])
    assert type(part) is dict and set(part) == {"embed", "layers"} and set(part["layers"]) == {"1"}
    chex.assert_trees_all_equal(part["layers"]["1"], tiny_params["layers"]["1"])
    assert set(restore(saved, only="*.mlp.down.weight")["layers"]["0"]["mlp"]) == {"down"}
    with pytest.raises(CheckpointError, match="no leaf matches 'layer.*'"):
        restore(saved, only=["embed.*", "layer.*"])


def test_orbax_reads_the_arrays_alone(tmp_path, mixed):
    import orbax.checkpoint as ocp

    save(mixed, tmp_path / "model")
    with ocp.StandardCheckpointer() as checkpointer:
        path = tmp_path / "model" / "arrays"
        item = checkpointer.metadata(path).item_metadata.tree
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), item)
        tree = checkpointer.restore(path, item)
    np.testing.assert_array_equal(tree["embed"]["weight"], mixed["embed"]["weight"])
    weight = mixed["layers"]["0"]["attention"]["q"]["weight"]
    np.testing.assert_array_equal(tree["layers"]["0"]["attention"]["q"]["weight"]["scales"], weight.scales)


def test_overwrite(saved, tiny_params, mixed):
    before = everything(saved.parent)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(mixed, saved)
    assert everything(saved.parent) == before
    save(mixed, saved, overwrite=True)
    assert_same(restore(saved), mixed)
    link = saved.with_name("link")
    link.symlink_to(saved)
    save(tiny_params, link, overwrite=True)
    assert link.is_symlink()
    assert_same(restore(link), tiny_params)
    assert sorted(os.listdir(saved.parent)) == ["link", "model"]


def test_what_is_not_ours_is_not_replaced(tmp_path, tiny_params):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("words")
    with pytest.raises(CheckpointError, match="not written by dsjax.save"):
        save(tiny_params, tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        save(tiny_params, tmp_path / "home" / "thesis", overwrite=True)
    with pytest.raises(CheckpointError, match="can not be written .*thesis"):
        save(tiny_params, tmp_path / "home" / "thesis" / "model")
    assert everything(tmp_path) == {"home/thesis": b"words"}
    (tmp_path / "empty").mkdir()
    save(tiny_params, tmp_path / "empty", overwrite=True)
    assert_same(restore(tmp_path / "empty"), tiny_params)


STAGES = ["_write_arrays", "_write_tokenizer", "_write_manifest", "_commit", "aside", "in place"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_changes_nothing(monkeypatch, saved, tiny_params, byte_tokenizer, stage, failure):
    before = everything(saved.parent)

    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patch:
        if stage.startswith("_"):
            patch.setattr(checkpoint, stage, fail)
        else:
            rename = os.rename

            def fail_there(source, target):
                there = Path(source) == saved if stage == "aside" else ".model.dsjax-new-" in Path(source).name
                return fail() if there else rename(source, target)

            patch.setattr(os, "rename", fail_there)
        with pytest.raises(CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt) as raised:
            save(dsjax.prepare(tiny_params), saved, tokenizer=byte_tokenizer, overwrite=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(raised.value) and str(saved) in str(raised.value)
    assert everything(saved.parent) == before
    assert_same(restore(saved), tiny_params)


def test_orbax_errors_are_ours(monkeypatch, tmp_path, tiny_params):
    import orbax.checkpoint as ocp

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: disk")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match="can not be written .ValueError: RESOURCE_EXHAUSTED"):
        save(tiny_params, tmp_path / "model")
    assert not os.listdir(tmp_path)


CHILD = """
import os, signal, sys, time
import jax
import dsjax
from dsjax import checkpoint
from dsjax.config import ModelConfig

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

moment, path = sys.argv[1:]
if moment == "between":
    rename = os.rename
    os.rename = lambda *args: die() if "dsjax-new" in str(args[0]) and str(args[1]) == path else rename(*args)
if moment == "deleting":
    checkpoint.shutil.rmtree = die
if moment == "writing":
    checkpoint._write_manifest = lambda *args: print("arrays written", flush=True) or time.sleep(600)
config = ModelConfig("llama", 97, 32, 48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, max_context=256)
checkpoint.save(dsjax.init(config, jax.random.key(1)), path, overwrite=True)
"""


def test_a_killed_save_leaves_the_old_one(tmp_path, tiny_params, mixed):
    paths = {moment: tmp_path / moment / "model" for moment in ("writing", "between", "deleting")}
    children = {}
    try:
        for moment, path in paths.items():
            save(tiny_params, path)
            command = [sys.executable, "-c", CHILD, moment, str(path)]
            children[moment] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert children["writing"].stdout.readline() == "arrays written\n"
        save(tiny_params, paths["writing"], overwrite=True)
        # That has left alone what another process was writing.
        assert list(paths["writing"].parent.glob(".model.dsjax-new-*/arrays/d/*"))
        children["writing"].kill()
        assert {child.wait(120) for child in children.values()} == {-signal.SIGKILL}
    finally:
        for child in children.values():
            child.kill()
            child.communicate()

    assert not paths["between"].exists() and saved_folder(paths["between"]) is not None
    for moment in ("writing", "between"):
        assert_same(restore(paths[moment]), tiny_params)
        assert saved_shapes(paths[moment]).config == tiny_params.config
    assert restore(paths["deleting"]).config.num_layers == 4
    for path in paths.values():
        assert any(name.startswith(".model.dsjax-") for name in os.listdir(path.parent))
        with pytest.raises(CheckpointError, match="overwrite=True"):
            save(mixed, path)
        save(mixed, path, overwrite=True)
        assert os.listdir(path.parent) == ["model"]
        assert_same(restore(path), mixed)


def test_damage_is_found(saved, tmp_path):
    files = sorted(everything(saved))
    assert len(files) > 5
    for name in files:
        for damage in ("missing", "truncated"):
            shutil.copytree(saved, tmp_path / "copy")
            file = tmp_path / "copy" / name
            if damage == "missing":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            with pytest.raises(CheckpointError) as raised:
                restore(tmp_path / "copy")
            assert (name if name != MANIFEST or damage == "truncated" else "not written by") in str(raised.value)
            shutil.rmtree(tmp_path / "copy")


def edit(manifest, *keys, value):
    *where, last = keys
    for key in where:
        manifest = manifest[key]
    manifest[last] = value


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], 2, "saved by a newer dsjax .format 2"),
        (["format"], "one", "is damaged"),
        (["config", "hidden_sise"], 3, "does not know: hidden_sise"),
        (["config", "num_layers"], 3, "leaf 'layers.2.* is missing"),
        (["config", "num_layers"], "two", "num_layers is 'two', which does not fit int"),
        (["config"], None, "config is None"),
        (["leaves", "embed.weight", "shape"], [96, 32], "leaf 'embed.weight' has shape"),
        (["leaves", "embed.weight", "dtype"], "float33", "is damaged"),
        (["leaves", "embed.weight"], 7, "is damaged"),
        (["leaves", "embed.weight"], {"scheme": "q9", "dtype": "float32"}, "'q9' is unknown"),
        (["leaves"], [], "is damaged"),
        (["files"], None, "is damaged"),
    ],
)
def test_wrong_manifests(saved, keys, value, message):
    manifest = json.loads((saved / MANIFEST).read_text())
    edit(manifest, *keys, value=value)
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        restore(saved)


def test_arrays_of_another_tree(tmp_path, saved, tiny_params):
    other = dsjax.init(dataclasses.replace(tiny_params.config, vocab_size=50), jax.random.key(0))
    save(other, tmp_path / "other")
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"] = {}
    (tmp_path / "other" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"'embed.weight' is not the float32\[97, 32\] that was saved"):
        restore(tmp_path / "other")


def test_unreadable_paths(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not written by dsjax.save"):
        restore(tmp_path)
    assert saved_folder(tmp_path) is None and saved_folder("org/name") is None


def test_trees_that_can_not_be_saved(tmp_path, tiny_config, tiny_params):
    def changed(leaf):
        return unflatten(flatten(tiny_params) | {"embed.weight": leaf}, tiny_config)

    gone = jnp.zeros((97, 32))
    gone.delete()
    wrong = dataclasses.replace(SCHEMES["q4_0"], zero=7)
    packed = QuantizedArray(jnp.zeros((97, 16), jnp.uint8), jnp.zeros((97, 1), jnp.float16), None, wrong, jnp.float32)
    for params, message in [
        (dict(tiny_params), "not a dsjax.Params"),
        (dsjax.abstract(tiny_config), "ShapeDtypeStruct, which has no values"),
        (changed(jnp.zeros((96, 32))), "'embed.weight' has shape"),
        (changed(gone), "'embed.weight' was donated"),
        (changed(packed), "scheme"),
    ]:
        with pytest.raises(ParameterError, match=message):
            save(params, tmp_path / "model")
    with pytest.raises(ParameterError, match="has no values"):
        jax.jit(lambda params: save(params, tmp_path / "model"))(tiny_params)
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    return Tokenizer(
        backend,
        bos_id=256,
        eos_ids=(258, 257),
        chat_template="{% for m in messages %}{{ bos_token }}{{ m.content }}<turn>{% endfor %}",
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


def test_the_tokenizer_comes_along(tmp_path, tiny_params, byte_tokenizer):
    save(tiny_params, tmp_path / "model", tokenizer=byte_tokenizer)
    loaded = load_tokenizer(tmp_path / "model")
    for name in ("bos_id", "eos_ids", "chat_template", "special_tokens", "special_ids"):
        assert getattr(loaded, name) == getattr(byte_tokenizer, name), name
    text, messages = "naïve <turn> 日本語", [{"role": "user", "content": "hé"}]
    assert loaded.encode(text) == byte_tokenizer.encode(text)
    assert loaded.apply_chat_template(messages) == byte_tokenizer.apply_chat_template(messages)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert theirs.encode(text) == loaded.encode(text) and theirs.bos_token_id == 256 and theirs.eos_token_id == 257
    assert theirs.apply_chat_template(messages)["input_ids"] == loaded.apply_chat_template(messages)
    assert_same(restore(tmp_path / "model"), tiny_params)


def test_config_json(tiny_config):
    scaling = RopeScaling("factors", original_context=64, factors=tuple(1 + i / 7 for i in range(8)))
    experts = Experts(count=4, per_token=2, size=8, layers=(False, True))
    config = dataclasses.replace(tiny_config, rope_scaling=scaling, windows=(None, 8), bos_id=3, experts=experts)
    data = config_to_json(config)
    assert data["rope_scaling"]["class"] == "RopeScaling" and data["windows"] == [None, 8]
    again = config_from_json(json.loads(json.dumps(data)))
    assert again == config and hash(again) == hash(config)
    del data["norm_eps"], data["class"]
    assert config_from_json(data) == config  # its default
    assert config_from_json(config_to_json(dataclasses.replace(config, rope_theta=np.float32(7)))).rope_theta == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 3, "depth": 2}, "config has fields that .* does not know: depth, width"),
        ({"rope_scaling": {"class": "RopeScaling", "kind": "linear", "spin": 1}}, "config.rope_scaling .*: spin"),
        ({"rope_scaling": {"factor": 2.0}}, "config.rope_scaling lacks kind"),
        ({"rope_scaling": {"class": "Path", "kind": "linear"}}, "config.rope_scaling is"),
        ({"rope_scaling": {"kind": "elastic"}}, "config.rope_scaling.kind is 'elastic'"),
        ({"activation": "exec"}, "config.activation is 'exec'"),
        ({"windows": [8, "9"]}, r"config.windows\[1\] is '9'"),
        ({"norm_eps": None}, "config.norm_eps is None"),
        ({"vocab_size": True}, "config.vocab_size is True"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_wrong_config_json(tiny_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(config_to_json(tiny_config) | changes)
    with pytest.raises(ConfigError, match="config lacks model_type, "):
        config_from_json({})
    with pytest.raises(ConfigError, match="config.eos_ids is a list"):
        config_to_json(dataclasses.replace(tiny_config, eos_ids=typing.cast(tuple, [5])))


def test_every_field_of_a_config_can_be_read():
    """Walks the type hints: a field of a kind that JSON does not give back would show here first."""

    def walk(hint, where):
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return [walk(option, where) for option in args]
        if origin is tuple:
            return [walk(option, where) for option in args if option is not ...]
        if dataclasses.is_dataclass(hint):
            return [walk(h, f"{where}.{name}") for name, h in typing.get_type_hints(hint).items()]
        assert origin is typing.Literal or hint in (bool, int, float, str, types.NoneType), where

    assert len(walk(ModelConfig, "config")) > 10


def test_importing_is_light():
    code = "import sys, dsjax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
