"""Who imports whom: the folder of a file says what it may import."""

import ast
import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
spec = importlib.util.spec_from_file_location("import_graph", DOCS / "import_graph.py")
graph = importlib.util.module_from_spec(spec)
spec.loader.exec_module(graph)

ROOT, FILES = graph.ROOT, graph.FILES
MIDDLE = {"conversion", "evaluation", "export", "hub", "inference"}
FLOORS = {  # folder -> the folders that it may import
    "data": set(),
    "kernels": set(),
    "model": {"kernels"},
    "inference": {"data", "kernels", "model"},
    "conversion": {"data", "kernels", "model"},
    "evaluation": {"data", "inference", "kernels", "model"},
    "export": {"data", "inference", "kernels", "model"},
    "hub": {"data", "inference", "kernels", "model"},
    "training": {"data", "kernels", "model", *MIDDLE},
    "cli": {"data", "kernels", "model", "training", *MIDDLE},
}
EVERYWHERE = {"", "__version__"}  # of the package itself


def test_every_file_has_a_floor():
    assert {graph.folder_of(path) for path in FILES} == set(FLOORS)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_point_downwards(folder):
    problems = []
    for path in FILES:
        if graph.folder_of(path) == folder:
            for name, _ in graph.imports_of_ours(path):
                if graph.folder_imported(name) not in FLOORS[folder] | {folder} | EVERYWHERE:
                    problems.append(f"{path.relative_to(ROOT)} imports {name}")
    assert problems == []


def test_the_floors_have_an_order():
    placed = set()
    for folder, below in FLOORS.items():
        assert below <= placed, folder
        placed.add(folder)


def test_files_of_the_model_import_only_siblings_in_the_form_that_transformers_copies():
    """`from .name import ...`; the one seam to the compiled kernels is guarded, because a checkpoint's own code runs
    without them."""
    problems, seams = [], []
    for path in (ROOT / "model").glob("[!_]*.py"):
        for name, node in graph.imports_of_ours(path):
            if name.startswith("kernels"):
                seams.append(path.name)
            elif not (isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == name.split(".")[1]):
                problems.append(f"{path.name} imports {name}")
    assert problems == []
    assert set(seams) == {"compiled.py"}


def test_the_picture_of_the_floors_is_that_of_the_code():
    drawn = (DOCS / "floors.svg").read_text(encoding="utf-8")
    assert drawn == graph.picture(), "draw it anew: python docs/import_graph.py"


def test_arrows_that_follow_from_others_are_left_out_of_the_picture():
    arrows = {("c", "b"), ("b", "a"), ("c", "a"), ("d", "a"), ("d", "c")}
    assert graph.without_implied(arrows) == [("b", "a"), ("c", "b"), ("d", "c")]
