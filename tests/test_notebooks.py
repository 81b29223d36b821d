"""The notebooks of docs/notebooks run from their first cell to the last, and what they show is stored in them."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
spec = importlib.util.spec_from_file_location("run_notebooks", DOCS / "site" / "run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)

SMALL = {"STEPS": 1, "IMAGES": 8}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def pictures(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_small_parameters_and_shows_its_pictures(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = json.loads(path.read_text())
    shown = run_notebooks.run(stored, **SMALL)
    assert len(pictures(shown)) == len(pictures(stored)) > 0


def test_a_parameter_that_a_notebook_lacks_is_refused():
    with pytest.raises(ValueError, match="STEP"):
        run_notebooks.run(json.loads(NOTEBOOKS[0].read_text()), STEP=1)
