import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import dsjax
from dsjax import cli, memory, session
from dsjax.config import ModelConfig
from dsjax.ragged.state import Finish
from policies import registry
from policies.base import write_tensors

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=256,
    eos_ids=(257,),
)
RUN = [sys.executable, "-c", "import sys; from dsjax.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """The command line sets up JAX for its process, which here is that of all tests."""
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 3 * leaf, dsjax.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def model(params, tmp_path_factory):
    """A folder as Hugging Face has it: a llama of random weights that speaks bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    policy = registry.get("llama")
    (folder / "config.json").write_text(json.dumps(policy.write_config(CONFIG)))
    save_file({name: np.asarray(leaf) for name, leaf in write_tensors(params, policy)}, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(model):
    return dsjax.load_tokenizer(model)


@pytest.fixture
def answer(params, tokenizer):
    """The text that `dsjax.generate` gives for a prompt that stands as it is."""

    def run(prompt, *, max_new_tokens, seed=0, **options):
        options = {"temperature": 0.0} | options
        out = dsjax.generate(
            params, [tokenizer.encode(prompt)], max_new_tokens=max_new_tokens, key=jax.random.key(seed), **options
        )
        ids = np.asarray(out.tokens)[0, 0, : int(out.lengths[0, 0])].tolist()
        return tokenizer.decode(ids[:-1] if out.finish[0, 0] == Finish.STOP else ids)

    return run


def chat_prompt(*messages):
    return "".join(f"[{role}]{text}" for role, text in messages) + "[a]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generate_streams_the_text_of_generate(model, answer, capsys):
    assert cli.main(["generate", model, "-p", "Once", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == answer(chat_prompt(("u", "Once")), max_new_tokens=12) + "\n"
    assert err.startswith("10 prompt tokens, ") and err.count("\n") == 1
    for figure in (" generated, ", "first token after ", " tokens/s, ", "peak memory "):
        assert figure in err


def test_raw_prompt_and_quiet(model, answer, capsys):
    assert cli.main(["generate", model, "-p", "Once", "--raw", "--max-new-tokens", "12", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == answer("Once", max_new_tokens=12) + "\n"
    assert err == ""


def test_sampling_flags(model, answer, capsys):
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = ["generate", model, "-p", "Once", "--raw", "--max-tokens", "20", "--ignore-eos", "--quiet"]
    assert cli.main([*command, *flags, "--seed", "7"]) == 0
    assert capsys.readouterr().out == answer("Once", max_new_tokens=20, seed=7, ignore_eos=True, **settings) + "\n"


def test_stop_ids(model, params, tokenizer, capsys):
    out = dsjax.generate(params, [tokenizer.encode("Once")], max_new_tokens=20, ignore_eos=True)
    ids = out.tokens[0, 0].tolist()
    stop = next(token for token in ids[3:] if token < 256)
    command = ["generate", model, "-p", "Once", "--raw", "--max-tokens", "20", "--ignore-eos", "--quiet"]
    assert cli.main([*command, "--stop-token-ids", str(stop)]) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids[: ids.index(stop)]) + "\n"


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_prompt_from_stdin(flags, model, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli.main(["generate", model, "--raw", "--max-tokens", "4", "--quiet", *flags]) == 0
    assert capsys.readouterr().out == answer("two\nlines", max_new_tokens=4) + "\n"


def test_default_length_is_what_the_context_leaves(model, capsys):
    assert cli.main(["generate", model, "-p", "x" * 250, "--raw", "--ignore-eos"]) == 0
    assert "250 prompt tokens, 6 generated" in capsys.readouterr().err


def test_max_model_len(model, capsys):
    command = ["generate", model, "-p", "x" * 20, "--raw", "--ignore-eos"]
    assert cli.main([*command, "--max-model-len", "32"]) == 0
    assert "20 prompt tokens, 12 generated" in capsys.readouterr().err
    assert cli.main([*command, "--max-model-len", "300"]) == 1
    assert "max_model_len=300 is beyond the model's context of 256 tokens" in capsys.readouterr().err


def test_system_message(model, answer, capsys):
    assert cli.main(["generate", model, "-p", "Once", "--system", "Be brief", "--max-tokens", "4", "--quiet"]) == 0
    assert capsys.readouterr().out == answer(chat_prompt(("s", "Be brief"), ("u", "Once")), max_new_tokens=4) + "\n"


def test_one_program_for_many_prompts(model, capsys):
    """Prompts and limits of different sizes share what is compiled."""
    for prompt, count in (("a", 3), ("b" * 100, 20)):
        assert cli.main(["generate", model, "-p", prompt, "--max-tokens", str(count), "--quiet"]) == 0
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        assert cli.main(["generate", model, "-p", "c" * 60, "--max-tokens", "9", "--quiet", "--seed", "3"]) == 0
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_chat(model, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nAgain\n/what\n/reset\nAgain\n/exit\nnever\n"))
    assert cli.main(["chat", model, "--max-tokens", "6", "--quiet"]) == 0
    first = answer(chat_prompt(("u", "Hi")), max_new_tokens=6)
    second = answer(chat_prompt(("u", "Hi"), ("a", first), ("u", "Again")), max_new_tokens=6)
    fresh = answer(chat_prompt(("u", "Again")), max_new_tokens=6)
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n{fresh}\n"
    assert err == "dsjax: no command /what; there are /reset and /exit\n"


def test_chat_goes_on_after_a_text_that_is_too_long(model, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 300 + "\nHi\n"))
    assert cli.main(["chat", model, "--max-tokens", "6", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == answer(chat_prompt(("u", "Hi")), max_new_tokens=6) + "\n"
    assert err.startswith("dsjax: error: ") and "context is 256" in err and err.count("\n") == 1


def test_terminal_shows_progress_and_clears_it(model, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["generate", model, "-p", "x" * 150, "--raw", "--max-tokens", "3"]) == 0
    shown = terminal.getvalue()
    assert "\r\x1b[2Kloading and compiling" in shown
    progress, closing = shown.rsplit("\r\x1b[2K", 1)
    assert closing.startswith("150 prompt tokens, ") and closing.count("\n") == 1
    assert "\n" not in progress
    assert "\x1b" not in capsys.readouterr().out


def test_info_of_a_folder(model, params, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: ("a shelf", 10_000_000))
    assert cli.main(["info", model]) == 0
    out = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    token = 2 * 1 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    pages = (9_000_000 - 4 * count) // (64 * token)
    said = [" ".join(line.split()) for line in out.splitlines()]
    size = memory.readable(4 * count)
    for line in (
        "architecture llama, 1 layers, hidden 32",
        "attention 4 query heads, 2 key/value heads of 8",
        "end of text 257 <|end|>",
        f"mlp F32 {3 * 32 * 48:,} {memory.readable(4 * 3 * 32 * 48)}",
        f"together {count:,} {size}",
        "memory 10.0 MB on a shelf, of which 90% may be used",
        f"weights {size} in float32, dequantized",
        f"keys, values {token} B a token, {memory.readable(64 * token)} a page",
        f"pages {pages:,} of 64 tokens: {64 * pages:,} tokens, {pages / 4:,.1f} full contexts",
    ):
        assert line in said


def test_info_of_what_dsjax_saved(model, params, capsys, tmp_path):
    dsjax.save(params, tmp_path / "saved", tokenizer=dsjax.load_tokenizer(model))
    assert cli.main(["info", str(tmp_path / "saved")]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"together {count:,} {memory.readable(4 * count)}" in said
    assert "end of text 257 <|end|>" in said


def test_info_of_quantized_weights(smollm2_path, capsys):
    assert cli.main(["info", str(smollm2_path)]) == 0
    dequantized = capsys.readouterr().out
    assert "134,515,008" in dequantized and "538.1 MB in float32, dequantized" in dequantized
    assert "Q4_1" in dequantized and "apache-2.0" in dequantized
    assert cli.main(["info", str(smollm2_path), "--quantize", "keep", "--dtype", "bfloat16"]) == 0
    assert "96.5 MB in bfloat16\n" in capsys.readouterr().out
    assert cli.main(["info", str(smollm2_path), "--quantize", "int8"]) == 0
    assert "134.6 MB in float32, quantized to int8" in capsys.readouterr().out
    assert cli.main(["info", str(smollm2_path), "--quantize", "int5"]) == 1
    assert "quantize='int5' is not supported" in capsys.readouterr().err


def test_quantized_weights_can_stay(smollm2_path):
    """What the command line computes with is the tree of `load`, fused; a part of it is enough to see."""
    kept = session.Session(smollm2_path, dtype="float32", quantize=None).params
    plain = session.Session(smollm2_path, dtype="float32", quantize="none").params
    weight = kept["layers"]["3"]["attention"]["qkv"]["weight"]
    assert isinstance(weight, dsjax.QuantizedArray)
    np.testing.assert_allclose(
        weight.dequantize(), plain["layers"]["3"]["attention"]["qkv"]["weight"], rtol=1e-6, atol=1e-6
    )
    assert not any(
        isinstance(leaf, dsjax.QuantizedArray)
        for leaf in jax.tree.leaves(plain, is_leaf=lambda leaf: isinstance(leaf, dsjax.QuantizedArray))
    )


def test_convert(model, params, capsys, tmp_path):
    out = tmp_path / "out"
    recipe = '{"embed": null, "*": "int8"}'
    assert cli.main(["convert", model, str(out), "--quantize", recipe, "--fit", "hqq", "--dtype", "float32"]) == 0
    expected = dsjax.quantize(params, {"embed": None, "*": "int8"}, fit="hqq")
    jax.tree.map(np.testing.assert_array_equal, dsjax.load(out), expected)
    assert dsjax.load_tokenizer(out).encode("a") == dsjax.load_tokenizer(model).encode("a")
    assert cli.main(["convert", model, str(out)]) == 1
    assert "is there already; remove it, or give --overwrite" in capsys.readouterr().err
    assert cli.main(["convert", model, str(out), "--overwrite", "--quantize", "int5"]) == 1
    assert "quantize='int5' is not supported" in capsys.readouterr().err
    assert dsjax.load(out).config == params.config, "what was there stays"
    with pytest.raises(SystemExit):
        cli.main(["convert", model, str(out), "--quantize", "{"])
    assert "is no JSON" in capsys.readouterr().err


def broken(model, folder, changes):
    """A copy of the model's folder with files replaced or, where the content is `None`, left out."""
    folder.mkdir()
    for file in Path(model).iterdir():
        content = changes.get(file.stem, file.read_bytes())
        if content is not None:
            (folder / file.name).write_bytes(content)
    return str(folder)


ERRORS = {
    "no such file": (["generate", "/no/such/model", "-p", "x"], {}, "no such file or folder"),
    "truncated": (["generate", "MODEL", "-p", "x"], {"model": b"\x10"}, "truncated"),
    "architecture": (["info", "MODEL"], {"config": b'{"model_type": "abacus"}'}, "abacus"),
    "no tokenizer": (["generate", "MODEL", "-p", "x"], {"tokenizer": None}, "tokenizer.json"),
    "empty prompt": (["generate", "MODEL", "--raw", "-p", ""], {}, "prompt 0 is empty"),
    "temperature": (["generate", "MODEL", "-p", "x", "--temperature", "-1"], {}, "temperature must be at least 0"),
    "too long": (["generate", "MODEL", "-p", "x" * 300], {}, "the model's context is 256"),
    "stop id": (["generate", "MODEL", "-p", "x", "--stop-token-ids", "9999"], {}, "stop_ids"),
    "system": (["generate", "MODEL", "--raw", "-p", "x", "--system", "y"], {}, "--system needs a chat template"),
    "no template": (["chat", "MODEL"], {"tokenizer_config": b"{}"}, "no chat template"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name, model, tmp_path, capsys):
    arguments, changes, message = ERRORS[name]
    folder = broken(model, tmp_path / "model", changes)
    arguments = [folder if part == "MODEL" else part for part in arguments]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsjax: error: ") and message in err and err.count("\n") == 1
    with pytest.raises(dsjax.DsjaxError, match="(?s).*"):
        cli.main([*arguments, "--debug"])


def test_what_was_not_foreseen_names_its_kind(model, capsys, monkeypatch):
    monkeypatch.setattr(session.Session, "stream", lambda *_: {}["missing"])
    assert cli.main(["generate", model, "-p", "x"]) == 1
    assert capsys.readouterr().err == "dsjax: error: KeyError: 'missing' (--debug shows where)\n"


def test_interrupt(model, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "stream", interrupted)
    assert cli.main(["generate", model, "-p", "x"]) == 130
    assert capsys.readouterr().err == "dsjax: interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["translate", "x"],
        ["generate", "x", "-p", "y", "--max-tokens", "0"],
        ["generate", "x", "-p", "y", "--dtype", "int3"],
        ["generate", "x"],  # with a terminal as stdin
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "dsjax" in capsys.readouterr().err.splitlines()[-1]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dsjax ")


def test_process(model, answer, tmp_path):
    """As a command: plain text on a pipe, programs kept for the next run, silence when the reader leaves."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    # Without the CUDA plugin of the tests, which talks on stderr when it finds no GPU.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if Path(path).name != "cuda")
    environment |= {"DSJAX_CACHE": str(tmp_path / "cache"), "PYTHONUTF8": "1", "XLA_FLAGS": ""}
    command = [*RUN, "generate", model, "-p", "Once", "--ignore-eos", "--max-tokens", "30"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = answer(chat_prompt(("u", "Once")), max_new_tokens=30, ignore_eos=True)
    assert done.stdout.decode() == expected + "\n"
    assert done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr
    assert list((tmp_path / "cache" / "programs").glob("jit_decode*"))

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""
