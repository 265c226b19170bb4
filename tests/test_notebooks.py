"""Notebooks run top to bottom, hold no code of their own and no output."""

import ast

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMAGES = {"01_isoflop": 2, "02_compare": 1, "03_experts": 2}


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_thin(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            nodes = ast.walk(ast.parse(cell.source))
            assert not any(
                isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda) for n in nodes
            )
            assert "fit_" not in cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not of ours
def test_notebooks_run_on_the_committed_records(path, tmp_path):
    """In a copy, so that runs of one's own beside the checkout do not stand in for them."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    notebook = read(path)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    tables = [o for o in outputs if "text/html" in o.get("data", {})]
    assert len(images) == IMAGES[path.stem]
    assert len(tables) >= 5
