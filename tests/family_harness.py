"""A random tiny model of a family, in transformers and in dsjax: what every family's tests compare.

A case is transformers' class and what its config changes against `BASE`. Files under tests/families list cases; the
table of families in the README is made from those lists.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import dsjax
import policies

BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOLERANCE = 1e-4
PROMPTS = (5, 17, 26)  # tokens of the sequences in the ragged batch
NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one family.

    Attributes:
      name: what transformers' classes begin with: `Llama` of `LlamaConfig` and `LlamaForCausalLM`.
      changes: fields of its config that differ from `BASE`; a value of `...` leaves the field to the class.
      generates: also compare greedy generation; once for each way that a family computes.
      scheduled: and that by `dsjax.generate`; once for each kind of state that the scheduler carries.
      config: name of the config's class, where it is not `name` and `Config`.
      attention: transformers' implementation of attention.
    """

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    generates: bool = False
    scheduled: bool = False
    config: str | None = None
    attention: str = "eager"


def make_model(case: Case) -> Any:
    """transformers' model with weights that hide nothing."""
    torch.manual_seed(sum(map(ord, case.name)))
    fields = {name: value for name, value in {**BASE, **case.changes}.items() if value is not ...}
    config = getattr(transformers, case.config or f"{case.name}Config")(**fields)
    config._attn_implementation = case.attention
    usual = getattr(transformers, f"{case.name}ForCausalLM", None)
    model = (usual or getattr(transformers, f"{case.name}LMHeadModel"))(config).eval()
    with torch.no_grad():  # biases and norms are born zero and one, which would hide a mix-up
        for tensor in (*model.parameters(), *_trained_buffers(model)):
            tensor += 0.1 * torch.randn_like(tensor)
    return model


def _trained_buffers(model: Any) -> list[Any]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def torch_logits(model: Any, tokens: Any) -> np.ndarray:
    """Logits of whole rows, float32."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


def check(case: Case, folder: Any) -> None:
    """Compare logits of whole texts, through the paged cache, after an export, and greedy generation.

    Args:
      case: what to compare.
      folder: an empty one.
    """
    model = make_model(case)
    model.save_pretrained(folder / "model")
    params = dsjax.load(folder / "model")
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, (2, 40))
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.05, "logits that say nothing would prove nothing"
    np.testing.assert_allclose(dsjax.logits(params, tokens), expected, atol=TOLERANCE)
    check_paged(params, model, rng)

    policies.export_hf(params, folder / "exported")
    options = {"attn_implementation": case.attention, "dtype": torch.float32}
    again = type(model).from_pretrained(folder / "exported", **options).eval()
    np.testing.assert_allclose(torch_logits(again, tokens), expected, atol=1e-5)
    if case.generates or case.scheduled:
        check_generation(params, model, rng, case.scheduled)


class Paged:
    """Sequences in one ragged batch, prompts in chunks and then a token each a step, called by hand.

    Attributes:
      budget: tokens of a step.
      page_size: tokens a page.
      pages_per_slot: what a sequence may hold.
    """

    budget, page_size, pages_per_slot = 32, 8, 8

    def __init__(self, params: dsjax.Params, final_lens: list[int]):
        self.params, self.final_lens, slots = params, final_lens, len(final_lens)
        self.pages = dsjax.KVPages.zeros(params.config, slots * self.pages_per_slot, self.page_size, jnp.float32)
        pages = np.random.default_rng(1).permutation(slots * self.pages_per_slot)
        self.table = pages.reshape(slots, self.pages_per_slot)
        self.done = np.zeros(slots, np.int32)

    def step(self, parts: list[Any]) -> list[np.ndarray]:
        """Logits `[tokens, V]` of each sequence's next tokens, of which there may be none."""
        slots, counts = len(parts), [len(part) for part in parts]
        padding = self.budget - sum(counts)
        cu_q_lens = np.concatenate([[0], np.cumsum(counts)])
        positions = np.concatenate([np.arange(n, n + q) for n, q in zip(self.done, counts, strict=True)])
        self.done = self.done + np.asarray(counts, np.int32)
        batch = dsjax.RaggedBatch(
            tokens=_int32(np.pad(np.concatenate(parts), (0, padding))),
            positions=_int32(np.pad(positions, (0, padding))),
            slot_of_token=_int32(np.pad(np.repeat(np.arange(slots), counts), (0, padding), constant_values=slots)),
            cu_q_lens=_int32(cu_q_lens),
            kv_lens=_int32(np.where(np.asarray(counts) > 0, self.done, 0)),
            page_table=_int32(self.table),
            logit_rows=jnp.arange(self.budget),
            final_lens=_int32(self.final_lens),
        )
        logits, self.pages = _jitted_forward()(self.params, batch, self.pages)
        return np.split(np.asarray(logits[: cu_q_lens[-1]]), cu_q_lens[1:-1])

    def read(self, prompts: list[Any]) -> Iterator[list[np.ndarray]]:
        """Logits of prompts of different lengths, in chunks of at most 10 tokens."""
        while any(left := [len(prompt) - n for prompt, n in zip(prompts, self.done, strict=True)]):
            counts = [min(rest, 10) for rest in left]
            yield self.step([p[n : n + q] for p, n, q in zip(prompts, self.done, counts, strict=True)])


def check_paged(params: dsjax.Params, model: Any, rng: np.random.Generator, steps: int = 6) -> None:
    """Three texts in one ragged batch: prompts in chunks, then a token each a step, against whole texts."""
    texts = [rng.integers(3, model.config.vocab_size, length + steps) for length in PROMPTS]
    expected = [torch_logits(model, text[None])[0] for text in texts]
    paged = Paged(params, [len(text) for text in texts])

    def compare(logits):
        for mine, theirs, n in zip(logits, expected, paged.done, strict=True):
            np.testing.assert_allclose(mine, theirs[n - len(mine) : n], atol=TOLERANCE)

    for logits in paged.read([text[:-steps] for text in texts]):
        compare(logits)
    for _ in range(steps):
        compare(paged.step([text[n : n + 1] for text, n in zip(texts, paged.done, strict=True)]))


def check_generation(params: dsjax.Params, model: Any, rng: np.random.Generator, scheduled: bool = False) -> None:
    """Greedy tokens of prompts of different lengths, generated together, against transformers one by one.

    Args:
      params: the model's parameters.
      model: transformers' model.
      rng: draws the prompts.
      scheduled: by `dsjax.generate`, which takes seconds to compile; else by calling the same forward pass by hand.
    """
    prompts = [rng.integers(3, model.config.vocab_size, length) for length in PROMPTS]
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    expected = []
    with contextlib.redirect_stderr(None), torch.no_grad():
        for prompt in prompts:
            out = model.generate(torch.tensor(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False)
            expected.append(out[0, len(prompt) :].tolist())
    if scheduled:
        out = dsjax.generate(
            dsjax.prepare(params),
            [prompt.tolist() for prompt in prompts],
            max_new_tokens=NEW_TOKENS,
            page_size=16,
            token_budget=32,
            ignore_eos=True,
        )
        assert np.asarray(out.tokens[:, 0]).tolist() == expected
        return
    paged = Paged(params, [len(prompt) + NEW_TOKENS for prompt in prompts])
    last: list[Any] = [None] * len(prompts)
    for logits in paged.read(prompts):
        last = [mine[-1] if len(mine) else kept for mine, kept in zip(logits, last, strict=True)]
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        chosen = [int(row.argmax()) for row in last]
        for text, token in zip(found, chosen, strict=True):
            text.append(token)
        last = [mine[-1] for mine in paged.step([[token] for token in chosen])]
    assert found == expected


@functools.cache
def _jitted_forward():
    forward = functools.partial(dsjax.forward, implementation="xla")
    # LLVM's passes take half of the time of a test, and run on the dense pass as they should.
    return jax.jit(forward, donate_argnums=2, compiler_options={"xla_backend_optimization_level": 0})


def _int32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)
