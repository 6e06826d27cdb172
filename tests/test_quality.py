"""What few bits cost a real model, SmolLM2-135M-Instruct: KL divergence and agreement with full precision."""

import numpy as np
import pytest

import dsjax
from bench import quality
from dsjax import testing

# From the best to the worst, with the least agreement on the likeliest token that a correct scheme has on this text.
SCHEMES = {"int8_g32": 0.96, "int8": 0.94, "fp8": 0.86, "fp6": 0.72, "int4": 0.6}


def test_windows_count_each_token_once():
    ids = list(range(100, 130))
    rows = quality.windows(ids, 12, 8)
    assert sorted(rows.targets.tolist()) == ids[1:]
    assert [row.sum() for row in rows.counted] == [11, 8, 8, 2]
    assert rows.tokens[2, :12].tolist() == ids[16:28]  # which sees at least four tokens before those that count


def test_figures_are_those_of_numpy(rng):
    params = testing.tiny_params(testing.tiny_config(tie_embeddings=False))
    texts = {
        "text": quality.windows(rng.integers(2, 320, 50).tolist(), 20, 15),
        "answers": quality.Rows.of([(rng.integers(2, 320, 30).tolist(), 10), (rng.integers(2, 320, 25).tolist(), 5)]),
    }
    other = quality.dequantized(quality.quantized(params, "int4", np.zeros((1, 1), np.int32)))
    record = quality.figures(quality.Reference(params, texts).compare(other))
    for name, rows in texts.items():
        mine, theirs = (np.asarray(dsjax.logits(tree, rows.tokens), np.float64) for tree in (params, other))
        mine, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (mine, theirs))
        kl = (np.exp(mine) * (mine - theirs)).sum(-1)[rows.counted].mean()
        same = mine.argmax(-1) == theirs.argmax(-1)
        np.testing.assert_allclose(record[f"{name}_kl"], kl, rtol=1e-3)
        assert record[f"{name}_top1"] == pytest.approx(same[rows.counted].mean()) and 0.2 < same.mean() < 1
        if name == "text":
            right = np.take_along_axis(theirs, np.roll(rows.tokens, -1, 1)[..., None], 2)[..., 0]
            np.testing.assert_allclose(record["perplexity"], np.exp(-right[rows.counted].mean()), rtol=1e-4)
        else:
            firsts = [np.argmin([*row[counted], False]) for row, counted in zip(same, rows.counted, strict=True)]
            assert record["same_tokens"] == np.median(firsts)


def test_fewer_bits_cost_more(smollm2_path):
    params = dsjax.load(smollm2_path, dtype="float32", quantize="none")
    ids = dsjax.load_tokenizer(smollm2_path).encode(quality.TEXT.read_text(encoding="utf-8"))
    reference = quality.Reference(params, {"text": quality.windows(ids[:256], 256, 192)})
    records = {}
    for name in SCHEMES:
        stored = quality.quantized(params, name, np.zeros(0))
        records[name] = quality.storage(stored) | quality.figures(reference.compare(quality.dequantized(stored)))
    divergences = [record["text_kl"] for record in records.values()]
    assert divergences == sorted(divergences) and divergences[0] < 0.01, records
    for name, least in SCHEMES.items():
        assert records[name]["text_top1"] > least, records
    assert records["int8_g32"]["bits"] == 8.5 and records["int4"]["bits"] == 4.5
