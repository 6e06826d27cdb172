import re
from pathlib import Path

import family_table
import pytest

import dsjax
from dsjax import testing

README = Path(__file__).parent.parent / "README.md"


BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(block, names):
    exec(compile(block, str(README), "exec"), names)


def test_code_runs(smollm2_path, capsys):
    """The first block runs as it stands, and says what the text says of it."""
    names = {}
    run(BLOCKS[0], names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert float(lines[-1]) < 1e-4
    assert names["four_answers"]._cache_size() == 1


def test_code_of_the_engine_runs(capsys):
    """The second with a tiny model, since a real one takes a while to compile."""
    run(BLOCKS[1], {"dsjax": dsjax, "params": testing.tiny_params(), "tokenizer": testing.tiny_tokenizer()})
    assert "pages" in capsys.readouterr().out.splitlines()[0]


def test_code_of_quantization_runs(tmp_path):
    params = testing.tiny_params()
    dsjax.export_hf(params, tmp_path / "model")
    names = {"dsjax": dsjax, "model": tmp_path / "model", "trained": params, "tokens": [[1, 2, 3]]}
    run(BLOCKS[2], names)
    assert names["out"].tokens.shape == (1, 1, 64)
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()


def test_the_table_of_families_is_that_of_the_tests():
    """`python tests/family_table.py` writes it."""
    text = README.read_text(encoding="utf-8")
    table = text.split(family_table.BEGIN)[1].split(family_table.END)[0].strip().splitlines()
    assert table[2:] == family_table.rows()
