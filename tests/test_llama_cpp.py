"""The optional comparison with llama.cpp (`make compare`), which reads the same GGUF file with kernels of its own."""

import jax
import numpy as np
import pytest

import dsjax

pytestmark = pytest.mark.compare


def test_arg_max_equals_llama_cpp(smollm2_path):
    """Where the two best logits lie apart, both say the same.

    llama.cpp quantizes activations to 8 bits on a CPU, so its logits differ by more than float32 rounding.
    """
    import llama_cpp
    from test_smollm2 import TEXTS

    tokenizer = dsjax.load_tokenizer(smollm2_path)
    params = jax.jit(lambda params: dsjax.prepare(params, dequantize=True))(dsjax.load(smollm2_path))
    model = llama_cpp.Llama(str(smollm2_path), n_ctx=1024, logits_all=True, verbose=False)
    agreed = counted = 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == model.tokenize(text.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(ids)
        theirs = np.asarray(model.scores[: len(ids)])
        mine = np.asarray(dsjax.logits(params, [ids])[0, : len(ids)])
        second, first = np.sort(theirs, axis=-1)[:, -2:].T
        clear = first - second > 0.5
        agreed += int(np.sum(theirs.argmax(-1)[clear] == mine.argmax(-1)[clear]))
        counted += int(clear.sum())
    assert counted > 500
    assert agreed >= 0.99 * counted
    print(f"{agreed} of {counted} positions agree")
