"""The README's table of families, made from what the tests compare: `python tests/family_table.py` writes it anew."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"


def cases() -> Iterator[tuple[str, list[str]]]:
    """Each of transformers' classes that are compared, and the configurations."""
    found: dict[str, list[str]] = {}
    folder = Path(__file__).parent / "families"
    sys.path[:0] = [str(folder), str(folder.parent)]
    for path in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        for key, case in getattr(module, "CASES", {}).items():
            found.setdefault(case.name, []).append(key)
    return iter(sorted(found.items(), key=lambda item: item[0].lower()))


def rows() -> list[str]:
    """The table's lines but for its head."""
    return [f"| {name} | {len(keys)} | {', '.join(keys)} |" for name, keys in cases()]


def main() -> None:
    """Write the table into the README."""
    import transformers

    text = README.read_text(encoding="utf-8")
    head = [
        f"Against transformers {transformers.__version__}:",
        "",
        "| class | configurations | compared |",
        "| --- | ---: | --- |",
    ]
    table = "\n".join([BEGIN, *head, *rows(), END])
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
