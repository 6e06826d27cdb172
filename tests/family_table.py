"""The README's table of families, made from what the tests compare: `python tests/family_table.py` writes it."""

import importlib
import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: python tests/family_table.py -->", "<!-- /families -->"


def cases() -> dict[str, list[str]]:
    """Each of transformers' classes that are compared, and the configurations."""
    found: dict[str, list[str]] = {}
    folder = Path(__file__).parent / "families"
    sys.path[:0] = [str(folder), str(folder.parent)]
    for path in sorted(folder.glob("test_*.py")):
        for key, case in getattr(importlib.import_module(path.stem), "CASES", {}).items():
            name = getattr(case, "name", None) or case.model
            found.setdefault(name, []).append(key)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def rows() -> list[str]:
    """The table's lines but for its head."""
    return [f"| {name} | {', '.join(keys)} |" for name, keys in cases().items()]


if __name__ == "__main__":
    import transformers

    head = [f"| transformers {transformers.__version__} | configurations that are compared |", "| --- | --- |"]
    block = "\n".join([BEGIN, "", *head, *rows(), "", END])
    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")
