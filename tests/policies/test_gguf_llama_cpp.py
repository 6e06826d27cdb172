"""The optional comparison of every architecture with llama.cpp (`make compare`), which reads the same files."""

import numpy as np
import pytest
import test_gguf_families
from family_harness import make_model
from test_gguf_families import CASES, write

import dsjax

pytestmark = pytest.mark.compare

# llama.cpp looks GELU up in a table of float16, in its tanh form; everything else is float32 here as there.
GELU = ("gemma", "phi2", "gpt2", "gptneox", "falcon", "bloom", "mpt", "starcoder2")
DIFFERS = {
    "command-r": "llama.cpp expects norms of heads in models of 64 layers alone",
    "deepseek-v2": "llama.cpp expects queries to be compressed, unless there are 26 or 27 layers",
    "gpt-oss": "llama.cpp rounds the ends of yarn's ramp, which the model was not trained with",
    "mixtral-per-expert": "llama.cpp no longer reads a tensor for each expert",
    "phi3": "llama.cpp leaves out the window",
}


@pytest.fixture(autouse=True)
def no_vocabulary(monkeypatch):
    usual_keys = test_gguf_families.usual_keys

    def keys(writer, config):
        usual_keys(writer, config)
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)

    monkeypatch.setattr(test_gguf_families, "usual_keys", keys)


def llama_cpp_logits(path, tokens: list[int], vocab_size: int) -> np.ndarray:
    """Logits of a text, with keys and values in float32."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp does not load the file"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = [llama_cpp.llama_get_logits_ith(context, i) for i in range(len(tokens))]
    logits = np.stack([np.ctypeslib.as_array(row, (vocab_size,)).copy() for row in rows])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERS])
def test_equals_llama_cpp(name, tmp_path):
    model = make_model(CASES[name].case)
    write(tmp_path / "model.gguf", CASES[name], model)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, 40)
    ours = dsjax.logits(dsjax.load(tmp_path / "model.gguf"), tokens[None])[0]
    theirs = llama_cpp_logits(tmp_path / "model.gguf", tokens.tolist(), model.config.vocab_size)
    np.testing.assert_allclose(ours, theirs, atol=3e-3 if name.startswith(GELU) else 1e-4)
