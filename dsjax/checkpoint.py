"""Parameter trees on disk, written by Orbax: saved whole or not at all, restored bit for bit, in part, or into shards.

A saved folder holds

    dsjax.json     the config, every leaf's dtype and shape, quantized leaves' schemes, and the sizes of the array files
    arrays/        an Orbax checkpoint of the tree, a quantized leaf as the dict of its arrays
    tokenizer.json, tokenizer_config.json, generation_config.json     those of Hugging Face, if there is a tokenizer

It is written beside its final place and renamed, so what has the final name is always complete. To replace a folder
takes two renames; what a save that was killed between them had moved aside is found by its name.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import glob
import json
import math
import os
import shutil
import types
import typing
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.core import Tracer

from dsjax.config import ModelConfig
from dsjax.errors import CheckpointError, ConfigError, ParameterError
from dsjax.params import Params, flatten, leaf_dtype, leaf_sharding, logical_axes, unflatten, validate
from dsjax.quantization import SCHEMES, QuantizedArray, Scheme
from dsjax.quantization.leaf import PARTS

if TYPE_CHECKING:
    from dsjax.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "dsjax.json"
_ARRAYS = "arrays"
# Reading a shard decodes whole chunks, so a chunk must be small beside a leaf.
_CHUNK_BYTES = 64 << 20
# What the host holds at once: a group of leaves, or one leaf that is larger.
_GROUP_BYTES = 1 << 29


def save(
    params: Params, path: str | os.PathLike[str], *, tokenizer: "Tokenizer | None" = None, overwrite: bool = False
) -> None:
    """Save a parameter tree, with its config and its tokenizer, as a folder that `dsjax.load` reads.

    The folder appears under its name when it is complete. Whatever ends a save early, what was there before stays; the
    next save to the same path clears away what was left.

    Args:
      params: the tree: plain, quantized or fused, on one device or sharded over those of this process.
      path: folder to write; its parents are made if they are missing.
      tokenizer: saved beside the parameters, for `dsjax.load_tokenizer(path)`.
      overwrite: replace a folder that `save` wrote, whole, whatever else has been put into it.

    Raises:
      ParameterError: the tree does not fit its config, or a leaf is no array that can be read here.
      CheckpointError: the path is taken, or can not be written.
    """
    validate(params)
    leaves = flatten(params)
    for name, leaf in leaves.items():
        _check_leaf(name, leaf)
        leaves[name] = leaf.in_rows() if isinstance(leaf, QuantizedArray) else leaf
    target = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target) as folder:
            _write_arrays(leaves, folder / _ARRAYS)
            if tokenizer is not None:
                _write_tokenizer(tokenizer, folder)
            _write_manifest(params.config, leaves, folder)
            _commit(folder, target, overwrite)
    except OSError as error:
        raise CheckpointError(f"{target}: can not be written ({error}); nothing was changed") from error


def restore(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    only: str | Sequence[str] | None = None,
) -> Any:
    """Read a tree that `save` wrote.

    Args:
      path: the folder.
      dtype: floating dtype of plain leaves, and what quantized ones read as; `None` keeps what was saved.
      mesh: devices to spread the leaves over by their logical axes, whatever they were saved from: each device reads
        its shard. `None` takes the default device.
      only: patterns of dotted leaf paths (`"layers.0.*"`, `"*.mlp.*"`; as `fnmatch` reads them) for a part of the tree.

    Returns:
      `Params` with the same config and structure; with `only`, a plain nested dict of the leaves that match.

    Raises:
      CheckpointError: the folder is none that `save` wrote, is damaged, was written by a newer version, or has no leaf
        for a pattern.
      ConfigError: `dtype` is not a floating dtype.
    """
    folder = _existing(path)
    shapes = _read_manifest(folder)
    axes, stored = logical_axes(shapes), flatten(shapes)
    names = list(stored) if only is None else _select(folder, stored, [only] if isinstance(only, str) else only)
    dtype = _floating(dtype)
    of = {name: None if dtype is None else jnp.dtype(leaf_dtype(name, dtype)) for name in names}
    wanted = {name: _request(stored[name], axes[name], of[name], mesh) for name in names}
    leaves = {}
    for group in _groups(wanted):
        arrays = _read_arrays(folder, group)
        for name, leaf in group.items():
            # Popped, so that the host's copy goes as the device's comes.
            leaves[name] = _place(f"{folder}: leaf '{name}'", leaf, arrays.pop(name))
    if only is None:
        return unflatten(leaves, shapes.config)
    return traverse_util.unflatten_dict(leaves, sep=".")


def saved_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder that `save` wrote to `path`, or `None`.

    It is `path` itself, except after a save that was killed as it replaced one folder by another.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if target.exists():
        return target if (target / MANIFEST).is_file() else None
    return next((folder for folder in _siblings(target, "old") if (folder / MANIFEST).is_file()), None)


def saved_shapes(path: str | os.PathLike[str]) -> Params:
    """The tree in a folder that `save` wrote, in `jax.ShapeDtypeStruct`s: nothing but the manifest is read.

    Raises:
      CheckpointError: as for `restore`.
    """
    return _read_manifest(_existing(path))


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A config as what JSON can hold: nested dataclasses are objects with a `class`, tuples are lists."""
    return _to_json(config, "config")


def config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The config that `config_to_json` wrote; a field that is not there has its default.

    Raises:
      ConfigError: a field is unknown or missing, or its value is not of its type.
    """
    return _from_json(ModelConfig, data, "config")


def _to_json(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {"class": type(value).__name__} | {name: _to_json(v, f"{where}.{name}") for name, v in fields.items()}
    if isinstance(value, tuple):
        return [_to_json(item, where) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{where} is a {type(value).__name__}; a config holds numbers, strings, tuples and dataclasses")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value from JSON is of the kind that a type hint asks for; what is inside is not looked at."""
    if hint in (None, types.NoneType):
        return value is None
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if (typing.get_origin(hint) or hint) is tuple:
        return isinstance(value, list | tuple)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping) and value.get("class", hint.__name__) == hint.__name__
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, {float: (int, float), int: int, str: str}.get(hint, ()))


def _from_json(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    fitting = [option for option in options if _fits(option, value)]
    if not fitting:
        raise ConfigError(f"{where} is {value!r}, which does not fit {getattr(hint, '__name__', hint)}")
    kind = fitting[0]
    if isinstance(value, Mapping):
        return _dataclass_from_json(kind, value, where)
    if isinstance(value, list | tuple):
        entries = typing.get_args(kind)
        if entries[1:] == (...,):
            entries = entries[:1] * len(value)
        if len(entries) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries, not {len(entries)}")
        return tuple(_from_json(entries[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    return value


def _dataclass_from_json(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(data.keys() - fields.keys() - {"class"}):
        raise ConfigError(f"{where} has fields that this version of dsjax does not know: {', '.join(unknown)}")
    absent = [name for name in fields if name not in data]
    missing = dataclasses.MISSING
    needed = [name for name in absent if fields[name].default is fields[name].default_factory is missing]
    if needed:
        raise ConfigError(f"{where} lacks {', '.join(needed)}")
    return kind(**{name: _from_json(hints[name], data[name], f"{where}.{name}") for name in fields if name in data})


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, QuantizedArray) and SCHEMES.get(leaf.scheme.name, leaf.scheme) != leaf.scheme:
        raise ParameterError(
            f"leaf '{name}' has the scheme {leaf.scheme}, whose name stands for another in dsjax.quantization.SCHEMES; "
            "make it with dsjax.quantization.scheme"
        )
    for array in dict(leaf.parts()).values() if isinstance(leaf, QuantizedArray) else [leaf]:
        if isinstance(array, Tracer) or not isinstance(array, jax.Array | np.ndarray):
            raise ParameterError(
                f"leaf '{name}' is a {type(array).__name__}, which has no values; save concrete arrays"
            )
        if isinstance(array, jax.Array) and array.is_deleted():
            raise ParameterError(f"leaf '{name}' was donated; save the tree that came out of that call")
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ParameterError(f"leaf '{name}' lies partly in other processes; save where all of it is addressable")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; give a folder that does not exist yet")
    if not overwrite:
        raise CheckpointError(f"{target}: exists; pass overwrite=True to replace it")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise CheckpointError(f"{target}: was not written by dsjax.save (no {MANIFEST}), so it is not replaced")


def _siblings(target: Path, kind: Literal["new", "old"]) -> list[Path]:
    """Folders of unfinished saves: the new one that was being written, or the old one moved aside."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.dsjax-{kind}-*"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder's lock, which goes with its process. Where folders can not be locked, nobody else is assumed there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target, locked, and gone afterwards unless it was renamed."""
    folder = target.with_name(f".{target.name}.dsjax-new-{uuid.uuid4().hex[:12]}")
    with contextlib.ExitStack() as stack:
        with _locked(target.parent):
            _clean(target)
            folder.mkdir()
            stack.enter_context(_locked(folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _clean(target: Path) -> None:
    """Undo what killed saves have left."""
    for folder in _siblings(target, "old"):
        if not target.exists() and (folder / MANIFEST).is_file():
            os.rename(folder, target)
        else:
            _discard(folder)
    for folder in _siblings(target, "new"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Delete an old folder; without a manifest from the first moment, so that nobody takes a half of it for a whole."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, target: Path, overwrite: bool) -> None:
    with _locked(target.parent):
        _check_target(target, overwrite)
        if not target.exists():
            os.rename(folder, target)
            return
        old = folder.with_name(folder.name.replace(".dsjax-new-", ".dsjax-old-"))
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(old, target)
            raise
    _discard(old)


def _write_arrays(leaves: dict[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

    arrays = {name: dict(leaf.parts()) if isinstance(leaf, QuantizedArray) else leaf for name, leaf in leaves.items()}
    tree = traverse_util.unflatten_dict(arrays, sep=".")
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=args))
    except Exception as error:  # TensorStore reports a full disk as a ValueError
        raise OSError(_summary(error)) from error


def _write_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    special = dict(tokenizer.special_tokens)
    if tokenizer.bos_id is not None and (text := tokenizer.backend.id_to_token(tokenizer.bos_id)) is not None:
        special.setdefault("bos_token", text)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    _write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    _write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    _write_text(folder / "generation_config.json", json.dumps(ids))


def _write_manifest(config: ModelConfig, leaves: dict[str, Any], folder: Path) -> None:
    manifest = {
        "format": FORMAT,
        "config": config_to_json(config),
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        "files": {
            file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted((folder / _ARRAYS).rglob("*"))
            if file.is_file()
        },
    }
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _describe(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, QuantizedArray):
        parts = {part: _describe(array) for part, array in leaf.parts()}
        # A scheme that is not in the table is written out.
        scheme = leaf.scheme.name if leaf.scheme.name in SCHEMES else dataclasses.asdict(leaf.scheme)
        shared = {"shares_inputs": True} if leaf.shares_inputs else {}
        return {"scheme": scheme, "dtype": jnp.dtype(leaf.dtype).name, **shared, **parts}
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _existing(path: str | os.PathLike[str]) -> Path:
    folder = saved_folder(path)
    if folder is not None:
        return folder
    if not os.path.exists(os.path.expanduser(path)):
        raise CheckpointError(f"{os.fspath(path)}: no such folder")
    raise CheckpointError(f"{os.fspath(path)}: was not written by dsjax.save; there is no {MANIFEST}")


def _read_manifest(folder: Path) -> Params:
    """The tree as shapes, after the manifest has been checked against itself and against the files."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        if not isinstance(version, int):
            raise ValueError(f"its format is {version!r}")
        if version > FORMAT:
            raise CheckpointError(
                f"{folder}: was saved by a newer dsjax (format {version}, this one reads up to {FORMAT}); update dsjax"
            )
        config = config_from_json(manifest["config"])
        shapes = unflatten({name: _abstract(entry) for name, entry in manifest["leaves"].items()}, config)
        validate(shapes)
        sizes = {name: int(size) for name, size in manifest["files"].items()}
    except CheckpointError:
        raise
    except (ConfigError, ParameterError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged ({type(error).__name__}: {error})") from error
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            raise CheckpointError(f"{folder / name}: is missing; copy the folder whole, or save it again")
        if found != size:
            raise CheckpointError(f"{folder / name}: has {found:,} bytes, {size:,} were saved; copy the folder again")
    return shapes


def _abstract(entry: dict[str, Any]) -> Any:
    """A leaf as shapes, from its entry in the manifest."""
    if "scheme" not in entry:
        return jax.ShapeDtypeStruct(tuple(map(int, entry["shape"])), jnp.dtype(entry["dtype"]))
    if isinstance(entry["scheme"], dict):
        scheme = Scheme(**entry["scheme"])
    elif entry["scheme"] in SCHEMES:
        scheme = SCHEMES[entry["scheme"]]
    else:
        raise ValueError(f"scheme {entry['scheme']!r} is unknown; known are: {', '.join(SCHEMES)}")
    parts: dict[str, Any] = {part: _abstract(entry[part]) if part in entry else None for part in PARTS}
    return QuantizedArray(
        **parts, scheme=scheme, dtype=jnp.dtype(entry["dtype"]), shares_inputs=bool(entry.get("shares_inputs"))
    )


def _select(folder: Path, names: Mapping[str, Any], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"{folder}: no leaf matches {pattern!r}; the first is '{next(iter(names))}'")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _floating(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} is not a dtype") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(f"dtype={found.name} is not floating; parameters are")
    return found


def _request(leaf: Any, axes: tuple[str, ...], dtype: np.dtype | None, mesh: jax.sharding.Mesh | None) -> Any:
    """A leaf as shapes with the dtype that it should have and where it should go; no sharding is the default device."""
    if isinstance(leaf, QuantizedArray):
        leaf = leaf.astype(dtype or leaf.dtype)
    else:
        leaf = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)
    if mesh is None:
        return leaf
    return jax.tree.map(
        lambda part, where: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where),
        leaf,
        leaf_sharding(leaf, axes, mesh),
    )


def _groups(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Leaves that are read together."""
    group, total = {}, 0
    for name, leaf in leaves.items():
        size = sum(math.prod(part.shape) * part.dtype.itemsize for part in jax.tree.leaves(leaf))
        if group and total + size > _GROUP_BYTES:
            yield group
            group, total = {}, 0
        group[name], total = leaf, total + size
    if group:
        yield group


def _read_arrays(folder: Path, group: dict[str, Any]) -> dict[str, Any]:
    """What Orbax has for these leaves, by dotted path: the shards in place, or numpy arrays for the default device."""
    import orbax.checkpoint as ocp

    def how(part: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if part.sharding is None:
            # Orbax would commit the array to a device; programs compiled for the tree of `init` would compile anew.
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=part.dtype)
        return ocp.ArrayRestoreArgs(sharding=part.sharding, global_shape=part.shape, dtype=part.dtype)

    parts = {name: dict(leaf.parts()) if isinstance(leaf, QuantizedArray) else leaf for name, leaf in group.items()}
    item = traverse_util.unflatten_dict(parts, sep=".")
    args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(how, item), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(folder / _ARRAYS, args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"{folder}: its arrays can not be read ({_summary(error)})") from error
    return traverse_util.flatten_dict(tree, sep=".", is_leaf=lambda path, _: ".".join(path) in group)


def _place(where: str, leaf: Any, found: Any) -> Any:
    """The leaf on its devices; what was read must be what was asked for."""

    def put(part: jax.ShapeDtypeStruct, array: Any) -> jax.Array:
        if not isinstance(array, jax.Array | np.ndarray) or (array.shape, array.dtype) != (part.shape, part.dtype):
            raise CheckpointError(
                f"{where} is not the {part.dtype.name}{list(part.shape)} that was saved; save it again"
            )
        return array if isinstance(array, jax.Array) else jax.device_put(array)

    if isinstance(leaf, QuantizedArray):
        placed = {part: put(shape, found[part]) for part, shape in leaf.parts()}
        leaf = dataclasses.replace(leaf, **placed)
    else:
        leaf = put(leaf, found)
    return jax.block_until_ready(leaf)


def _summary(error: BaseException) -> str:
    """The first line of what went wrong at the root."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
