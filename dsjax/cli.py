"""The command line: `dsjax generate`, `dsjax chat`, `dsjax info`, `dsjax convert`.

Text goes to stdout and nothing else does, so that a pipe gets just the text. What is going on is shown on stderr while
that is a terminal; a closing line of figures goes there always, unless `--quiet`. JAX is imported by the commands that
need it: usage and its errors do not wait for it.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dsjax.errors import CheckpointError, DsjaxError, RequestError

if TYPE_CHECKING:
    from dsjax.session import Session
    from dsjax.streaming import StreamStep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: default those of the process.

    Returns:
      Exit code: 0, 1 after an error, 130 after Ctrl-C, 141 when nobody reads stdout any more. Wrong usage exits with 2.
    """
    begin = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(arguments, argparse.Namespace(begin=begin))
    if args.version:
        print(_version())
        return 0
    if args.command is None:
        parser.error("give a command: generate, chat, info or convert")
    # XLA's notes on CPU features and tuning are not for who asked a question; its errors are.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Until the first token: tracing makes very many objects, all of them wanted, and looking through them for garbage
    # takes a twelfth of the time until then.
    gc.disable()
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("\n" * sys.stderr.isatty() + "dsjax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        _report(error)
        return 1
    finally:
        gc.enable()


def _report(error: Exception) -> None:
    """An error as one line on stderr; one that dsjax did not foresee also says its kind and how to learn more."""
    text = " ".join(str(error).split())
    if not isinstance(error, DsjaxError | OSError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    print(f"dsjax: error: {text}", file=sys.stderr)


def _version() -> str:
    def of(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "(not installed)"

    return f"dsjax {of('dsjax')}, jax {of('jax')}, python {platform.python_version()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsjax", description="Generate text from a checkpoint with JAX.")
    parser.add_argument("--version", action="store_true", help="show versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="{generate,chat,info,convert}")

    model = argparse.ArgumentParser(add_help=False)
    add = model.add_argument
    add("model", metavar="MODEL", help="a hub id, a Hugging Face folder, or a .gguf file")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what to compute in; auto: float32 on a CPU, bfloat16 elsewhere",
    )
    add(
        "--quantize",
        default="auto",
        metavar="SCHEME",
        help="keep: weights as quantized as the file has them; none: dequantize; auto: none on a CPU, where it is "
        "faster, else keep; or a scheme to quantize to, such as int4 or fp8",
    )
    add("--max-model-len", type=_count, metavar="N", help="longest sequence in tokens; default: the model's own")
    add("--debug", action="store_true", help="show tracebacks")

    talk = argparse.ArgumentParser(add_help=False)
    add = talk.add_argument
    add(
        "--max-tokens",
        "--max-new-tokens",
        type=_count,
        metavar="N",
        help="most tokens to generate; default: 256, or what the context leaves",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    add("--top-k", type=int, default=0, metavar="K", help="default: 0, off")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: 1, off")
    add("--min-p", type=float, default=0.0, metavar="P", help="default: 0, off")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="default: 1, off")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling; default: 0")
    add("--stop-token-ids", type=int, nargs="+", default=[], metavar="ID", help="stop at these ids too")
    add("--ignore-eos", action="store_true", help="go on where the model would end")
    add("--system", metavar="TEXT", help="system message, for the chat template")
    add("--quiet", action="store_true", help="no progress and no closing line")

    generate = commands.add_parser("generate", parents=[model, talk], help="answer or continue one prompt")
    generate.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; '-', or none and a pipe: read stdin")
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as it is")
    generate.set_defaults(run=_generate, usage=generate.error)
    commands.add_parser("chat", parents=[model, talk], help="talk with a model").set_defaults(run=_chat)
    info = commands.add_parser("info", parents=[model], help="architecture, bytes by part, memory plan")
    info.set_defaults(run=_info)
    convert = commands.add_parser("convert", help="write a checkpoint as dsjax keeps it, quantized if you like")
    add = convert.add_argument
    add("model", metavar="MODEL", help="a hub id, a Hugging Face folder, or a .gguf file")
    add("out", metavar="OUT", help="the folder to write, for dsjax.load")
    add(
        "--quantize",
        type=_recipe,
        metavar="RECIPE",
        help="a scheme, such as int4 or fp8, none to dequantize, or a recipe in JSON: "
        """'{"embed": null, "*": "int4"}'; default: as the file has it""",
    )
    add(
        "--fit",
        choices=("nearest", "hqq"),
        default="nearest",
        help="how scales are found: from the extremes of each group, or by half-quadratic fitting, with less error; "
        "default: %(default)s",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of plain leaves")
    add("--overwrite", action="store_true", help="replace OUT, if dsjax wrote it")
    add("--debug", action="store_true", help="show tracebacks")
    convert.set_defaults(run=_convert, quiet=False)
    return parser


def _recipe(text: str) -> Any:
    """A scheme's name, or a mapping in JSON, for argparse."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from error


def _count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _generate(args: argparse.Namespace) -> None:
    prompt = args.prompt
    if prompt is None and sys.stdin.isatty():
        args.usage("give a prompt with -p, or pipe one in")
    if prompt is None or prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    session = _open(args)
    if args.raw or session.tokenizer.chat_template is None:
        if args.system is not None:
            raise RequestError("--system needs a chat template and none is used; write it into the prompt")
        ids = session.tokenizer.encode(prompt)
    else:
        ids = session.tokenizer.apply_chat_template([*_system(args), {"role": "user", "content": prompt}])
    _answer(args, session, ids, args.begin)


def _chat(args: argparse.Namespace) -> None:
    session = _open(args)
    if session.tokenizer.chat_template is None:
        raise RequestError("this model has no chat template; use dsjax generate")
    _steps(args, session, session.tokenizer.apply_chat_template([*_system(args), {"role": "user", "content": "Hello"}]))
    live = sys.stdin.isatty()
    if live:
        with contextlib.suppress(ImportError):  # where Python has it, it gives input() editing and history
            import readline  # noqa: F401
        print("/reset forgets the conversation, /exit or Ctrl-D ends it", file=sys.stderr)
    messages = _system(args)
    while True:
        try:
            text = input("> " if live else "").strip()
        except EOFError:
            print("\n" * live, end="")
            break
        if text == "/exit":
            break
        if text == "/reset":
            messages = _system(args)
        elif text.startswith("/"):
            print(f"dsjax: no command {text.split()[0]}; there are /reset and /exit", file=sys.stderr)
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                answer = _answer(args, session, session.tokenizer.apply_chat_template(asked), time.perf_counter())
            except RequestError as error:  # such as a text that is too long: the conversation goes on without it
                if args.debug:
                    raise
                _report(error)
            except KeyboardInterrupt:
                if not live:
                    raise
                print(flush=True)
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _setup(args: argparse.Namespace) -> tuple[str, str | None]:
    """Turn on the cache of compiled programs; returns `dtype` and `quantize` for `dsjax.load`."""
    import jax

    from dsjax.program_cache import keep_programs
    from policies.quantizing import check_recipe

    keep_programs()
    on_cpu = jax.default_backend() == "cpu"
    dtype, quantize = args.dtype, args.quantize
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    if quantize == "auto":
        quantize = "none" if on_cpu else "keep"
    quantize = None if quantize == "keep" else quantize
    check_recipe(quantize)
    return dtype, quantize


def _open(args: argparse.Namespace) -> "Session":
    with _status(args, "starting"):
        dtype, quantize = _setup(args)
        from dsjax.session import Session
        from policies.sources import hub
    path = hub.resolve(args.model)  # outside of the status line: fetching has a display of its own
    with _status(args, f"opening {args.model}"):
        return Session(path, dtype=dtype, quantize=quantize, max_model_len=args.max_model_len)


def _steps(args: argparse.Namespace, session: "Session", ids: list[int]) -> "Iterator[StreamStep]":
    """What answers a prompt, loaded and compiled but not started."""
    import jax

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos")
    settings = {name: getattr(args, name) for name in names}
    stop_ids = args.stop_token_ids + ([] if args.ignore_eos else list(session.tokenizer.eos_ids))
    with _status(args, "loading and compiling (programs are kept for the next run)"):
        key = jax.random.key(args.seed)
        return session.stream(*session.layout(ids, args.max_tokens, key=key, stop_ids=stop_ids, **settings))


def _answer(args: argparse.Namespace, session: "Session", ids: list[int], begin: float) -> str:
    """Stream one answer to stdout and the closing line to stderr; returns the answer.

    Args:
      args: the command line.
      session: the model.
      ids: the prompt.
      begin: when the reader began to wait.
    """
    from dsjax.ragged.state import Finish
    from dsjax.tokenizer import StreamDecoder

    steps = _steps(args, session, ids)
    gc.enable()
    ready = time.perf_counter()
    with _status(args, f"reading the prompt, {len(ids)} tokens") as say:
        step = next(steps)
        while not step.tokens:
            say(f"reading the prompt, {step.prompt_tokens_read} of {len(ids)} tokens")
            step = next(steps)
    first = last = time.perf_counter()
    decoder, pieces, generated = StreamDecoder(session.tokenizer), [], 0
    while True:
        last = time.perf_counter()
        generated += len(step.tokens)
        stopped = step.finish == Finish.STOP
        pieces.append(decoder.push(step.tokens[:-1] if stopped else step.tokens))
        print(pieces[-1], end="", flush=True)
        if step.finish != Finish.RUNNING:
            break
        step = next(steps)
    pieces.append(decoder.finish())
    print(pieces[-1], flush=True)
    if not args.quiet:
        _close(len(ids), generated, first - begin, first - ready, last - first)
    return "".join(pieces)


def _close(prompt: int, generated: int, waited: float, reading: float, decoding: float) -> None:
    from dsjax import memory

    host, device = memory.peak()
    figures = [
        f"{prompt} prompt tokens",
        f"{generated} generated",
        f"first token after {waited:.2f} s ({reading:.2f} s of it reading the prompt)",
        *([f"{(generated - 1) / decoding:.1f} tokens/s"] if generated > 1 else []),
        f"peak memory {memory.readable(host)}"
        + ("" if device is None else f", on the device {memory.readable(device)}"),
    ]
    print(", ".join(figures), file=sys.stderr)


def _info(args: argparse.Namespace) -> None:
    dtype, quantize = _setup(args)
    from dsjax import info

    print(info.describe(args.model, dtype=dtype, quantize=quantize, max_model_len=args.max_model_len))


def _convert(args: argparse.Namespace) -> None:
    import dsjax
    from dsjax import checkpoint
    from policies.sources import hub

    path = hub.resolve(args.model)
    if not args.overwrite and os.path.lexists(args.out):
        raise CheckpointError(f"{args.out} is there already; remove it, or give --overwrite if dsjax wrote it")
    with _status(args, f"converting {args.model}"):
        tokenizer = dsjax.load_tokenizer(path)
        checkpoint.save(
            dsjax.load(path, dtype=args.dtype, quantize=args.quantize, fit=args.fit),
            args.out,
            tokenizer=tokenizer,
            overwrite=args.overwrite,
        )


@contextlib.contextmanager
def _status(args: argparse.Namespace, text: str) -> Iterator[Callable[[str], None]]:
    """One line on the terminal: what is going on, and for how long. Yields a function that changes what it says."""
    if args.quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    current, begin, done = [text], time.perf_counter(), threading.Event()

    def draw():
        while True:
            line = f"{current[0]}, {time.perf_counter() - begin:.0f} s"
            print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
            if done.wait(0.1):
                break

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield lambda text: current.__setitem__(0, text)
    finally:
        done.set()
        thread.join()
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
