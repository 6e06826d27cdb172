"""DeepSpeed's entry point: `init_inference` with DeepSpeed's options gives an `Engine`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import policies
from dsjax import checkpoint, memory
from dsjax.config import ModelConfig
from dsjax.deepspeed_options import defaults, read_json_object, read_options, unknown
from dsjax.deepspeed_quantization import OPTIONS as QUANTIZATION
from dsjax.deepspeed_quantization import recipe
from dsjax.errors import CheckpointError, ConfigError
from dsjax.params import Params, prepare_in_place
from dsjax.tokenizer import Tokenizer, load_tokenizer
from policies.sources import hub
from policies.sources.hf_folder import HfFolder

if TYPE_CHECKING:
    from dsjax.engine import Engine

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16", "half"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    "int8": "int8",
}
_DESCRIPTOR = ("type", "version", "checkpoints", "parallelization", "tp_size", "mp_size", "base_dir", "dtype")
_RANK = re.compile(r"mp_rank_\d+")
_LOADING = ("dtype", "checkpoint", "config", "quant.enabled", *QUANTIZATION)
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def default_inference_config() -> dict[str, Any]:
    """Every option of `init_inference` with the value that it has when it is not given.

    Returns:
      A nested dictionary of the caller's own, which `init_inference` takes. `None` leaves a choice to dsjax.
    """
    return defaults()


def init_inference(
    model: Any,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> "Engine":
    """An engine for a model, from the options of `deepspeed.init_inference` and of FastGen.

    Options are those of DeepSpeed's `DeepSpeedInferenceConfig` and `RaggedInferenceEngineConfig`, with their aliases.
    What has a meaning here:

    - `dtype`: as `dsjax.load`; `int8` stands for weights in `q8_0`. By default float32 on a CPU, else bfloat16.
    - `quant`: `weight.num_bits` 8 is `q8_0`, 4 `q4_0`, or `q4_1` where `q_type` is `"asymmetric"`;
      `weight.post_init_quant` gives the modules whose names hold its keys 4 or 8 bits in groups, the first key that
      does; `weight.quantized_initialization` all matrices.
    - `quantization_mode`: `"wf6af16"` is `fp6` for all matrices but the embedding and the head, experts included.
    - `checkpoint`, `base_dir`: where the weights are, if not in `model`; what `dsjax.load` takes, or a descriptor.
    - `save_mp_checkpoint_path`: `dsjax.save` writes there what was loaded.
    - `tensor_parallel.tp_size`: weights and pages are spread over the first so many devices.
    - `max_out_tokens`, `state_manager.max_context`: longest sequence, prompt included; by default the model's own.
    - `min_out_tokens`: an error if the pages hold fewer.
    - `replace_with_kernel_inject`: `False` runs without Pallas kernels; here the default is `True`.
    - `use_triton`: kernels in Triton wherever there are several kinds.
    - `state_manager.max_ragged_batch_size`: tokens of a step.
    - `state_manager.max_tracked_sequences`, `state_manager.max_ragged_sequence_count`: both bound how many sequences
      run at once; here a sequence that holds pages has a place in every step.
    - `state_manager.memory_config`: `size` is the number of pages with mode `"allocate"`, bytes to leave free with
      `"reserve"`.

    Any other that asks for something is either an error, because results would be others, or has no meaning and is
    warned of.

    Args:
      model: parameters (`dsjax.Params`), which are taken as they are (see `dsjax.prepare`); or what `dsjax.load` takes:
        a hub id, a path, a live `transformers` model, or a dictionary of arrays with the option `args`, which is its
        `ModelConfig` or what its config.json holds.
      config: nested options, or the path of a JSON file that holds them.
      tokenizer: or where one is; `None` takes that of the checkpoint, if it has one.
      **kwargs: options beside those in `config`.

    Returns:
      The engine.

    Raises:
      ConfigError: an option is unknown, contradicts another, has a value that it can not have, or asks for what would
        change results and is not there; or there are fewer devices, or less memory for pages, than asked for.
      CheckpointError: the checkpoint is missing, damaged, or does not fit its config.

    Warns:
      UserWarning: once, of all options that have no meaning here.
    """
    from dsjax.engine import Engine

    options = read_options(config, kwargs)
    arguments = _engine_arguments(options)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    params, found = _load(model, options, arguments.get("mesh"), wants_tokenizer=tokenizer is None)
    tokenizer = found if tokenizer is None else tokenizer
    if options["save_mp_checkpoint_path"] is not None:
        checkpoint.save(params, options["save_mp_checkpoint_path"], tokenizer=tokenizer, overwrite=True)
    if params is not model and "mesh" not in arguments:
        params = prepare_in_place(params)
    engine = Engine(params, tokenizer, **arguments)
    least, room = options["min_out_tokens"], engine.sizes.pages * engine.sizes.page_size
    if room < least:
        engine.release()
        raise ConfigError(
            f"min_out_tokens={least}: there is room for {room} tokens beside the weights; quantize them, or take more "
            "devices"
        )
    return engine


def _engine_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `Engine` is given beside parameters and tokenizer; what is left out is its own choice."""
    most, least = options["max_out_tokens"], options["min_out_tokens"]
    if most is not None and least > most:
        raise ConfigError(f"min_out_tokens={least} is more than max_out_tokens={most}")
    inject, triton = options["replace_with_kernel_inject"], options["use_triton"]
    if triton and not inject:
        raise ConfigError("use_triton=True needs kernels, and replace_with_kernel_inject=False asks for none")
    arguments = {
        "mesh": _mesh(options),
        "max_context": most,
        "implementation": "triton" if triton else None if inject else "xla",
        "slots": _slots(options),
        "token_budget": options["state_manager.max_ragged_batch_size"],
        **_pages(options),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _mesh(options: Mapping[str, Any]) -> jax.sharding.Mesh | None:
    count = options["tensor_parallel.tp_size"] if options["tensor_parallel.enabled"] else 1
    if count == 1:
        return None
    devices = jax.devices()
    if count > len(devices):
        raise ConfigError(
            f"tensor_parallel.tp_size={count}: JAX has {len(devices)} devices ({devices[0].platform}); for those of "
            "several hosts call jax.distributed.initialize() first"
        )
    return jax.sharding.Mesh(np.array(devices[:count]), ("tensor",))


def _slots(options: Mapping[str, Any]) -> int | None:
    """How many sequences run at once: no more than may be tracked, than may be in a step, or than it has tokens for."""
    sequences = options["state_manager.max_ragged_sequence_count"]
    tracked, tokens = (options[f"state_manager.max_{name}"] for name in ("tracked_sequences", "ragged_batch_size"))
    for name, limit in (("max_tracked_sequences", tracked), ("max_ragged_batch_size", tokens)):
        if sequences is not None and limit is not None and sequences > limit:
            raise ConfigError(f"state_manager.max_ragged_sequence_count={sequences} is more than {name}={limit}")
    bounds = [bound for bound in (tracked, sequences) if bound is not None]
    return min(bounds + [tokens] * (tokens is not None)) if bounds else None


def _pages(options: Mapping[str, Any]) -> dict[str, Any]:
    mode, size = (options[f"state_manager.memory_config.{name}"] for name in ("mode", "size"))
    if mode not in ("reserve", "allocate"):
        raise ConfigError(f"state_manager.memory_config.mode={mode!r}; there are 'reserve' and 'allocate'")
    if mode == "allocate":
        if not size:
            raise ConfigError("state_manager.memory_config: mode 'allocate' needs size, the number of pages")
        return {"pages": size}
    if size is None:
        return {}
    name, total = memory.available()
    if size >= total:
        raise ConfigError(
            f"state_manager.memory_config.size={size}: so many bytes are to be left free, and {name} has {total}"
        )
    return {"memory_fraction": 1 - size / total}


def _load(
    model: Any, options: Mapping[str, Any], mesh: jax.sharding.Mesh | None, wants_tokenizer: bool
) -> tuple[Params, Tokenizer | None]:
    """Parameters and, if wanted, the tokenizer that lies beside them."""
    if isinstance(model, Params):
        asked = [name for name in _LOADING if options[name] not in (None, {})]
        if asked:
            raise ConfigError(f"{', '.join(asked)}: these parameters are loaded already; give that to dsjax.load")
        return model, None
    dtype = _dtype(options["dtype"])
    source, described = model, options["config"]
    if options["checkpoint"] is not None:
        if isinstance(model, Mapping):
            raise ConfigError("checkpoint: the model is a dictionary of weights already; leave one out")
        source = _source(options["checkpoint"], options["base_dir"])
        if hasattr(model, "config"):
            _check_sizes(policies.load_config(model), policies.load_config(source), source)
    elif described is not None:
        source = model.state_dict() if hasattr(model, "state_dict") else model
        described = described.to_dict() if hasattr(described, "to_dict") else described
    tokenizer = None
    if wants_tokenizer:
        found = (_tokenizer(place) for place in (model, source) if isinstance(place, str | os.PathLike))
        tokenizer = next((one for one in found if one is not None), None)
    quantize = recipe(options, source, described)
    if dtype == "int8":
        if quantize not in (None, "q8_0"):
            raise ConfigError(f"dtype=int8 and {_asked(options)} contradict each other; leave dtype out")
        dtype, quantize = None, "q8_0"
    return policies.load(source, config=described, dtype=dtype, quantize=quantize, mesh=mesh), tokenizer


def _asked(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={options[name]!r}" for name in QUANTIZATION if options[name])


def _check_sizes(expected: ModelConfig, found: ModelConfig, source: Any) -> None:
    for name in _SIZES:
        if getattr(expected, name) != getattr(found, name):
            raise ConfigError(
                f"checkpoint {source}: {name} is {getattr(found, name)}, that of the model given is "
                f"{getattr(expected, name)}"
            )


def _tokenizer(place: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a checkpoint, if it has one."""
    path = checkpoint.saved_folder(place) or hub.resolve(place)
    if path.is_file() and path.suffix not in HfFolder.SUFFIXES:
        return load_tokenizer(path)  # inside the file
    folder = path if path.is_dir() else path.parent
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _dtype(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) or str(value).startswith("torch."):
        name = str(value).lower().removeprefix("torch.")
    else:
        try:
            name = jnp.dtype(value).name
        except TypeError:
            name = ""
    if name not in _DTYPES:
        raise ConfigError(f"dtype={value!r} is not supported; there are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _source(given: Any, base: str | os.PathLike[str]) -> Any:
    """What `dsjax.load` should load: the option `checkpoint` itself, or what a descriptor describes."""
    root = Path(base)
    if isinstance(given, str | os.PathLike):
        path = root / given
        if path.suffix != ".json":
            return path if base else given
        descriptor, root = read_json_object(path), root if base else path.parent
    elif isinstance(given, Mapping):
        descriptor = given
    else:
        raise ConfigError(f"checkpoint is a {type(given).__name__}; give a path, a hub id, or a descriptor")
    for name in descriptor:
        if name not in _DESCRIPTOR:
            raise unknown(f"checkpoint.{name}", tuple(f"checkpoint.{known}" for known in _DESCRIPTOR))
    files = descriptor.get("checkpoints")
    if descriptor.get("type") == "ds_model" or isinstance(files, Mapping):
        raise ConfigError(
            "checkpoint: what DeepSpeed wrote to save_mp_checkpoint_path is not read; give the checkpoint that it was "
            "made from"
        )
    files = [files] if isinstance(files, str | os.PathLike) else files
    if not isinstance(files, list | tuple) or not files:
        raise ConfigError(f"checkpoint.checkpoints={files!r} should be a list of files")
    if not base and descriptor.get("base_dir"):
        root = Path(descriptor["base_dir"])
    return _common([root / file for file in files])


def _common(files: list[Path]) -> Path:
    """The one path that loads these files: the only one's own, or their folder."""
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: named by the checkpoint's descriptor, and not there")
    if len(files) == 1 and (files[0].is_dir() or (files[0].parent / "config.json").is_file()):
        return files[0]
    folders = {file.parent.parent if _RANK.fullmatch(file.parent.name) else file.parent for file in files}
    if len(folders) > 1:
        raise ConfigError(f"checkpoint: its files lie in several folders ({', '.join(map(str, sorted(folders)))})")
    (folder,) = folders
    if any(folder.glob("*.safetensors")) and not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError(f"checkpoint: {folder} has safetensors beside the files named, and they would be loaded")
    return folder
