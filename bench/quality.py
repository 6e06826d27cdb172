"""What storing a model in few bits costs: bytes, errors of products, KL divergence, agreement, perplexity.

    python -m bench.quality --json bench/results/quality.json --plot bench/results/quality.png
    python -m bench.quality --schemes int8,int4_asym:hqq,int4:awq --model path/or/hub-id --text some.txt

Every scheme is compared with the same weights in float32: those of the checkpoint, dequantized where it is quantized
itself. All matrices are quantized, embedding and head included, and read back as plain float32, so that one compiled
program serves all schemes, and nothing but the rounding of the weights differs; but for `NAME_w8a8`, whose products
are those of 8-bit activations. `NAME:hqq` and `NAME:awq` fit the scales (`dsjax.quantization.quantize_array`,
`dsjax.quantization.awq`).

Text is read in windows of `--window` tokens, each `--stride` tokens after the one before. A token counts in the first
window that has it, so all but the first token of the text count once, and those after the first window have at least
`window - stride` tokens before them. Perplexity is `exp` of the mean negative log-likelihood over these tokens. Answers
are the model's own in float32, greedy, to a few questions; only what was generated counts.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dsjax
from bench.environment import environment
from dsjax.errors import ParameterError
from dsjax.layers.linear import head, matmul
from dsjax.params import flatten
from dsjax.quantization import SCHEMES, QuantizedArray, quantize, scheme
from dsjax.quantization.awq import quantize_for_inputs
from dsjax.quantization.inputs import weight_inputs
from dsjax.transformer import hidden_states

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HERE = pathlib.Path(__file__).parent
TEXT = HERE / "quality_text.txt"  # Jane Austen, Pride and Prejudice (1813), chapter 1
FITTED = ("int4:hqq", "int4:awq", "int4_asym:hqq", "int4_asym:awq")
MULTIPLE = 64  # lengths of rows are multiples of it
HEAD_ROWS = 64  # positions whose logits are alive at once
PRODUCT_ROWS = 64  # of each weight's input, for the error of the product
QUESTIONS = (
    "What is gravity?",
    "Write a short story about a lighthouse.",
    "Explain how bread is made.",
    "List three facts about Rome.",
    "Why is the sky blue?",
    "How can I learn to play the piano?",
    "Describe how a bicycle works.",
    "Who was Marie Curie?",
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts that models are compared on.

    Attributes:
      tokens: `int32[R, L]`, right-padded.
      counted: `bool[R, L]`, the positions whose predictions of the next token count.
    """

    tokens: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[list[int], int]]) -> "Rows":
        """Rows of tokens, each with the place of the first token whose prediction counts."""
        length = -(-max(len(ids) for ids, _ in rows) // MULTIPLE) * MULTIPLE
        tokens = np.zeros((len(rows), length), np.int32)
        counted = np.zeros(tokens.shape, bool)
        for row, (ids, first) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            counted[row, first - 1 : len(ids) - 1] = True
        return cls(tokens, counted)

    @property
    def targets(self) -> np.ndarray:
        """The tokens after the positions that count."""
        return np.roll(self.tokens, -1, axis=1)[self.counted]


def windows(ids: list[int], window: int, stride: int) -> Rows:
    """A text in windows that overlap, each token counted in the first window that has it."""
    rows = [(ids[:window], 1)]
    for begin in range(stride, len(ids) - (window - stride), stride):
        rows.append((ids[begin : begin + window], window - stride))
    return Rows.of(rows)


def answers(params: dsjax.Params, tokenizer: dsjax.Tokenizer, questions: tuple[str, ...], new: int) -> Rows:
    """What the model itself answers, greedy."""
    if tokenizer.chat_template is None:
        prompts = [tokenizer.encode(question) for question in questions]
    else:
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in questions]
    out = dsjax.generate(params, prompts, max_new_tokens=new)
    rows = []
    for index, prompt in enumerate(prompts):
        said = out.tokens[index, 0, : int(out.lengths[index, 0])]
        rows.append((prompt + np.asarray(said).tolist(), len(prompt)))
    return Rows.of(rows)


@jax.jit
def _hidden(params, tokens):
    return hidden_states(params, tokens[None])[0]


@jax.jit
def _differences(reference, params, positions):
    """KL, agreement and log-likelihood `[N]` of two models' hidden states `[N, D]` before given tokens."""

    def one(position):
        mine, theirs, target = position
        expected = jax.nn.log_softmax(head(mine[None], reference, reference.config)[0])
        found = jax.nn.log_softmax(head(theirs[None], params, params.config)[0])
        kl = jnp.sum(jnp.exp(expected) * (expected - found))
        return kl, expected.argmax() == found.argmax(), found[target]

    return lax.map(one, positions, batch_size=HEAD_ROWS)


class Reference:
    """The model in full precision, and what it makes of texts.

    Args:
      params: plain parameter tree.
      texts: rows by name; each name's rows become figures.
    """

    def __init__(self, params: dsjax.Params, texts: dict[str, Rows]):
        self.params, self.texts = params, texts
        self._states = self._read(params)

    def _read(self, params: dsjax.Params) -> np.ndarray:
        """Hidden states of all positions that count: without the logits, which would be `V / D` times as large."""
        return np.concatenate(
            [
                np.asarray(_hidden(params, tokens))[counted]
                for rows in self.texts.values()
                for tokens, counted in zip(rows.tokens, rows.counted, strict=True)
            ]
        )

    def compare(self, params: dsjax.Params) -> dict[str, dict[str, np.ndarray]]:
        """KL, agreement and log-likelihood of another tree, `[R, L]`, by text; what does not count is NaN."""
        targets = np.concatenate([rows.targets for rows in self.texts.values()])
        columns = _differences(self.params, params, (self._states, self._read(params), targets))
        found, begin = {}, 0
        for name, rows in self.texts.items():
            end = begin + len(rows.targets)
            found[name] = {key: np.full(rows.tokens.shape, np.nan) for key in ("kl", "agrees", "logprob")}
            for spread, column in zip(found[name].values(), columns, strict=True):
                spread[rows.counted] = np.asarray(column)[begin:end]
            begin = end
        return found


@functools.partial(jax.jit, static_argnames="dtype")
def _plain(leaf: QuantizedArray, dtype: Any) -> jax.Array:
    return leaf.dequantize(dtype)


def dequantized(params: Any) -> Any:
    """The tree with plain float32 leaves, but for those whose activations are rounded as well.

    Leaf by leaf, since schemes have few shapes and trees many leaves.
    """

    def plain(leaf):
        is_read_back = isinstance(leaf, QuantizedArray) and leaf.scheme.activations is None
        return _plain(leaf, jnp.float32) if is_read_back else leaf

    return jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def quantized(params: dsjax.Params, name: str, calibration: np.ndarray) -> dsjax.Params:
    """The tree in a scheme, `NAME` or `NAME:hqq` or `NAME:awq`."""
    to, _, fit = name.partition(":")
    if fit == "awq":
        return quantize_for_inputs(params, to, lambda tree: dsjax.logits(tree, calibration))
    return quantize(params, to, fit=fit or "nearest")  # pyright: ignore[reportArgumentType]


def storage(params: Any) -> dict[str, float]:
    """Bytes of the tree, and bits of a weight among those that are quantized, scales included."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    stored = [leaf for leaf in leaves if isinstance(leaf, QuantizedArray)] or leaves
    bits = 8 * sum(leaf.nbytes for leaf in stored) / sum(leaf.size for leaf in stored)
    return {"bytes": int(sum(leaf.nbytes for leaf in leaves)), "bits": bits}


@jax.jit
def _product_error(weight, stored, x):
    exact = x @ weight.T
    # Small errors are lost in the difference of two products.
    change = matmul(x, stored) - exact if isinstance(stored, QuantizedArray) else x @ (weight - stored).T
    return jnp.linalg.norm(change) / jnp.linalg.norm(exact)


def product_error(params: Any, other: Any, inputs: dict[str, jax.Array]) -> float:
    """Relative error of a product with a weight, `|x (W - W').T| / |x W.T|`, mean over the weights."""
    leaves = flatten(params)
    others = flatten(other)
    return statistics.fmean(float(_product_error(leaves[path], others[path], x)) for path, x in inputs.items())


def figures(found: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """The numbers of a scheme from what `Reference.compare` gives for `text` and `answers`."""
    record = {}
    for name, columns in found.items():
        record |= {f"{name}_kl": float(np.nanmean(columns["kl"])), f"{name}_top1": float(np.nanmean(columns["agrees"]))}
    if "text" in found:
        record["perplexity"] = float(np.exp(-np.nanmean(found["text"]["logprob"])))
    if "answers" in found:
        # Up to its first other token, greedy decoding of the other model is this very text.
        rows = [row[~np.isnan(row)] for row in found["answers"]["agrees"]]
        record["same_tokens"] = statistics.median(int(np.cumprod(row).sum()) for row in rows if row.size)
    return record


COLUMNS = {
    "MB": lambda r: f"{r['bytes'] / 1e6:.1f}",
    "bits/weight": lambda r: f"{r['bits']:.2f}",
    "product error": lambda r: f"{r['product_error']:.4f}",
    "KL, text": lambda r: f"{r['text_kl']:.4f}",
    "top-1, text": lambda r: f"{r['text_top1']:.3f}",
    "perplexity": lambda r: f"{r['perplexity']:.2f}",
    "KL, answers": lambda r: f"{r['answers_kl']:.4f}",
    "top-1, answers": lambda r: f"{r['answers_top1']:.3f}",
    "same tokens": lambda r: f"{r['same_tokens']:g}",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each scheme against full precision, a line of the table as soon as it is known."""
    params = dsjax.load(args.model, dtype="float32", quantize="none")
    tokenizer = dsjax.load_tokenizer(args.model)
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    calibration = np.asarray(tokenizer.encode(args.calibration.read_text(encoding="utf-8"))[:512])[None]
    texts = {
        "text": windows(ids, args.window, args.stride),
        "answers": answers(params, tokenizer, QUESTIONS, args.new),
    }
    reference = Reference(params, texts)
    shown = jnp.asarray(ids[: args.window])[None]
    inputs = jax.jit(lambda tree: weight_inputs(lambda tree: dsjax.logits(tree, shown), tree, PRODUCT_ROWS))(params)
    sizes = {name: int(rows.counted.sum()) for name, rows in texts.items()}
    print(f"{args.model}: {sizes['text']} tokens of text, {sizes['answers']} of {len(QUESTIONS)} answers count")
    print("| scheme | " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS))
    records = []
    is_all = args.schemes == "all"
    for name in ["float32", *([*SCHEMES, *FITTED] if is_all else args.schemes.split(","))]:
        try:
            stored = params if name == "float32" else quantized(params, name, calibration)
        except ParameterError as error:
            if not is_all:
                raise
            print(f"{name} is left out: {error}", flush=True)
            continue
        record = {"scheme": name, **storage(stored)}
        stored = dequantized(stored)
        record |= {"product_error": product_error(params, stored, inputs), **figures(reference.compare(stored))}
        records.append(record)
        print(f"| {name} | " + " | ".join(of(record) for of in COLUMNS.values()) + " |", flush=True)
    method = {"window": args.window, "stride": args.stride, "new": args.new, "counted": sizes}
    return {"model": str(args.model), "text": args.text.name, "method": method, "schemes": records}


def plot(record: dict[str, Any], path: pathlib.Path) -> None:
    """Draw bits of a weight against the KL divergence on the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"int": "C0", "uint": "C0", "nf": "C2"}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for one in record["schemes"]:
        if one["scheme"] == "float32":
            continue
        to, _, fit = one["scheme"].partition(":")
        color = colors.get(scheme(to).element.rstrip("0123456789"), "C1")
        axes.scatter(one["bits"], one["text_kl"], color=color, facecolors="none" if fit else color, s=22)
        axes.annotate(one["scheme"], (one["bits"], one["text_kl"]), (4, 2), textcoords="offset points", fontsize=6.5)
    for label, color in (("integers", "C0"), ("floating", "C1"), ("table (nf4)", "C2")):
        axes.scatter([], [], color=color, s=22, label=label)
    axes.scatter([], [], color="0.3", facecolors="none", s=22, label="fitted scales")
    axes.set(xlabel="bits a weight, scales included", ylabel="KL divergence to float32, nats a token", yscale="log")
    axes.margins(x=0.12)  # labels stand to the right
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=MODEL, help="path or hub id (default %(default)s)")
    add("--schemes", default="all", help="names with commas between, or all (default %(default)s)")
    add("--text", type=pathlib.Path, default=TEXT, help="file to read (default a chapter of Pride and Prejudice)")
    add("--calibration", type=pathlib.Path, default=HERE.parent / "README.md", help="file whose first tokens AWQ sees")
    add("--window", type=int, default=256, help="tokens that the model sees at once (default %(default)s)")
    add("--stride", type=int, default=192, help="tokens from one window to the next (default %(default)s)")
    add("--new", type=int, default=64, help="most tokens of an answer (default %(default)s)")
    add("--json", "--out", type=pathlib.Path, help="write the result to this file")
    add("--plot", type=pathlib.Path, help="draw it to this file")
    add("--redraw", type=pathlib.Path, help="draw such a result, and measure nothing")
    args = parser.parse_args()
    if not 0 < args.stride < args.window:
        parser.error(f"--stride {args.stride} must be above 0 and below --window {args.window}")
    if args.redraw:
        plot(json.loads(args.redraw.read_text()), args.plot or args.redraw.with_suffix(".png"))
        return
    record = {"environment": environment(("jax", "numpy")), **measure(args)}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + os.linesep)
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
