"""Runs notebooks without Jupyter, and stores what they show.

`python docs/site/run_notebooks.py` does it to those of `docs/notebooks`; the tests run their cells with small
parameters. A cell shows what it prints, and the value of its last expression if it has one, as in Jupyter.
"""

import ast
import base64
import contextlib
import copy
import io
import json
import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(notebook: dict, **parameters) -> dict:
    """Run the cells in order in one namespace.

    Args:
        notebook: in nbformat's version 4.
        parameters: take the place of the values in the cell that is tagged "parameters".

    Returns:
        A copy of the notebook with the outputs of this run.
    """
    notebook, namespace = copy.deepcopy(notebook), {"__name__": "__main__"}
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        cell["execution_count"], cell["outputs"] = number, _run_cell("".join(cell["source"]), namespace, number)
        if "parameters" in cell["metadata"].get("tags", ()):
            if unknown := parameters.keys() - namespace.keys():
                raise ValueError(
                    f"parameters {sorted(unknown)}: the notebook's cell of parameters has none of that name"
                )
            namespace.update(parameters)
    return notebook


def _run_cell(source: str, namespace: dict, number: int) -> list[dict]:
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value, name = io.StringIO(), None, f"<cell {number}>"
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if isinstance(value, Image.Image):
            data = {"image/png": _png(value), "text/plain": [f"picture of {value.width} x {value.height} pixels"]}
        outputs.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return outputs


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main(names: list[str]):
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = run(json.loads(path.read_text()))
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
