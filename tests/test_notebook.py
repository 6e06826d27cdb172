from pathlib import Path

import nbclient
import nbformat
import pytest

PATH = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_committed_without_outputs(notebook):
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_runs_and_shows_pictures(notebook, smollm2_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")  # as users run it
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert len(pictures) == 5
    assert "all pages free again: True" in text
    assert "compiled programs: 1" in text
