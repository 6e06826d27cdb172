import re
from pathlib import Path

import family_table
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_code_runs(smollm2_path, capsys):
    """The block runs as it stands, and says what the text says of it."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert float(lines[-1]) < 1e-4
    assert names["four_answers"]._cache_size() == 1


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()


def test_the_table_of_families_is_that_of_the_tests():
    """`python tests/family_table.py` writes it."""
    text = README.read_text(encoding="utf-8")
    table = text.split(family_table.BEGIN)[1].split(family_table.END)[0].strip().splitlines()
    assert table[2:] == family_table.rows()
