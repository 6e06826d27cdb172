"""A real model, SmolLM2-135M-Instruct as GGUF, against transformers reading the same file in float32."""

import jax
import numpy as np
import pytest
import torch
import transformers

import dsjax
from dsjax.quantization import QuantizedArray

TEXTS = [
    """The history of the bicycle begins in the early nineteenth century, when a German baron built a running machine of
wood with two wheels in line. Riders sat astride it and pushed themselves along with their feet. Fifty years later a
blacksmith in Paris fixed pedals to the front wheel, and the velocipede was born. Its iron tyres shook the bones of
whoever dared to ride it over cobbles. Makers then enlarged the front wheel, for a larger wheel went further with each
turn of the pedals, until riders sat more than a metre above the ground and falls became serious. The chain changed all
that. With a chain and two sprockets the wheels could be small and equal again, and in 1885 the safety bicycle took the
shape that it still has. Three years later a veterinary surgeon in Belfast filled rubber tubes with air for the tricycle
of his son, and the bone shaker was forgotten. Bicycles gave freedom to people who could never have kept a horse.""",
    """def merge_sort(items):
    if len(items) <= 1:
        return items
    middle = len(items) // 2
    left = merge_sort(items[:middle])
    right = merge_sort(items[middle:])
    merged = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    merged.extend(left[i:])
    merged.extend(right[j:])
    return merged


def binary_search(items, target):
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


if __name__ == "__main__":
    numbers = merge_sort([5, 3, 9, 1, 7])
    print(numbers, binary_search(numbers, 7))
""",
    """Dear Margaret, thank you for your letter of the 14th, which reached me only yesterday because the ferry had
not run
for a week. The storm took two of the old pear trees and most of the slates from the barn, but nobody was hurt and the
bees seem not to have noticed. We have had the builder here; he scratched his head, drank four cups of tea, and promised
a price by Friday. I do not hope for much. The children ask every day when you will come. Tom has learned to whistle and
will not stop, and Anna is reading the big atlas from the first page to the last and has reached Bolivia. If you take
the early train on the 3rd, someone will wait for you at the halt with the trap, rain or shine. Bring warm things, for
the nights are cold already, and a book or two for me, anything at all so long as it is long. The one that you sent in
March went round the whole village and came back with notes in the margin by at least three different hands.""",
    """Photosynthesis is the process by which plants, algae and some bacteria turn light into chemical energy. In plants
it takes place in the chloroplasts, small bodies in the cells of the leaf that hold the green pigment chlorophyll. The
first stage needs light. Photons strike the pigment and lift electrons to a higher energy; these travel along a chain of
proteins in the membrane, and as they go, protons are pumped across it. The gradient drives an enzyme that makes ATP,
and the electrons at last reduce NADP. Water is split to replace them, and oxygen is given off. The second stage, the
Calvin cycle, needs no light. The enzyme RuBisCO fixes carbon dioxide onto a sugar of five carbons; the product splits
at once into two molecules of three carbons, and ATP and NADPH from the first stage turn these into sugar. Six turns of
the cycle give one glucose. About 1% of the light that falls on a field of wheat ends as energy in its grain.""",
    """Q: What is the capital of Australia? A: Canberra. Q: How many sides has a hexagon? A: Six. Q: Who wrote "Pride
and
Prejudice"? A: Jane Austen, in 1813. Q: What is 17 * 23? A: 391. Q: Which planet is the largest in the solar system? A:
Jupiter. Q: What do you call a young swan? A: A cygnet. Q: In which year did the Berlin Wall fall? A: 1989. Q: What is
the chemical symbol of gold? A: Au. Q: How many strings has a violin? A: Four. Q: Which is the longest river in Africa?
A: The Nile. Q: What is the square root of 144? A: 12. Q: Who painted the ceiling of the Sistine Chapel? A:
Michelangelo. Q: Which gas do plants take in? A: Carbon dioxide. Q: How many minutes are there in a day? A: 1,440. Q:
What is the freezing point of water in degrees Fahrenheit? A: 32. Q: Which language has the most native speakers? A:
Mandarin Chinese. Q: Who was the first person to walk on the moon? A: Neil Armstrong, on 20 July 1969. Q: What
colour""",
]
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "To make a good omelette, first",
    "In 1969, humans",
    "The square of 12 is",
    "Dear Sir or Madam,",
    "Gravity is the force that",
]


@pytest.fixture(scope="module")
def ours(smollm2_path):
    return dsjax.load(smollm2_path)


@pytest.fixture(scope="module")
def plain(ours):
    return jax.jit(lambda params: dsjax.prepare(params, dequantize=True))(ours)


@pytest.fixture(scope="module")
def theirs(smollm2_path):
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None  # both go on after the end of the text
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return dsjax.load_tokenizer(smollm2_path)


def test_blocks_are_kept_as_they_are(ours):
    leaf = ours["layers"]["0"]["mlp"]["down"]["weight"]
    assert isinstance(leaf, QuantizedArray) and leaf.scheme.name == "q4_1" and leaf.shape == (576, 1536)
    assert ours["embed"]["weight"].scheme.name == "q8_0"
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(ours)) < 97_000_000


def test_logits_equal_transformers(plain, theirs, tokenizer):
    texts = [tokenizer.encode(text) for text in TEXTS]
    assert min(map(len, texts)) >= 200
    logits = dsjax.logits(plain, texts)
    for row, text in zip(logits, texts, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([text])).logits[0].numpy()
        mine = np.asarray(row[: len(text)])
        assert np.abs(mine - expected).max() < 2e-3
        np.testing.assert_array_equal(mine.argmax(-1), expected.argmax(-1))


def test_greedy_continuations_equal_transformers(plain, theirs, tokenizer):
    """Each token is the arg-max of transformers' logits after those before it, which is what greedy means."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    out = dsjax.generate(plain, prompts, max_new_tokens=64, ignore_eos=True)
    for mine, prompt in zip(out.tokens[:, 0].tolist(), prompts, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + mine[:-1]])).logits[0, len(prompt) - 1 :]
        assert mine == logits.argmax(-1).tolist()
    with torch.no_grad():
        said = theirs.generate(
            torch.tensor(prompts[:1]),
            attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.tokens[0, 0].tolist() == said[0, len(prompts[0]) :].tolist()


def test_quantized_leaves_give_the_same_logits(ours, plain, tokenizer):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    mine, dense = (dsjax.logits(tree, prompts) for tree in (ours, plain))
    for row, other, prompt in zip(mine, dense, prompts, strict=True):
        row, other = (np.asarray(each)[: len(prompt)] for each in (row, other))
        assert np.abs(row - other).max() < 1e-3
        np.testing.assert_array_equal(row.argmax(-1), other.argmax(-1))
