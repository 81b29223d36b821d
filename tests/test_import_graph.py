"""Who imports whom: the folder of a file says what it may import."""

import ast
from pathlib import Path

import pytest

import mask2former_hf

ROOT = Path(mask2former_hf.__file__).parent
MIDDLE = {"conversion", "evaluation", "hub", "inference"}
FLOORS = {  # folder -> the folders that it may import
    "data": set(),
    "kernels": set(),
    "model": {"kernels"},
    "inference": {"data", "kernels", "model"},
    "conversion": {"data", "kernels", "model"},
    "evaluation": {"data", "inference", "kernels", "model"},
    "hub": {"data", "inference", "kernels", "model"},
    "training": {"data", "kernels", "model", *MIDDLE},
    "cli": {"data", "kernels", "model", "training", *MIDDLE},
}
PUBLIC = {name: module.split(".")[0] for name, module in mask2former_hf._EXPORTS.items()}
EVERYWHERE = {"", "__version__"}  # of the package itself


def imports_of_ours(path):
    """Modules of this package that a file imports, relative to the package root, with the statement's form."""
    package = ("mask2former_hf", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield ".".join((*base, name))[len("mask2former_hf") :].lstrip("."), node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mask2former_hf":
            for alias in node.names:
                rest = node.module[len("mask2former_hf") :].lstrip(".")
                yield rest or alias.name, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mask2former_hf":
                    yield alias.name[len("mask2former_hf") :].lstrip("."), node


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT]


def test_every_file_has_a_floor():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(FLOORS)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_point_downwards(folder):
    problems = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == folder:
            for name, _ in imports_of_ours(path):
                target = PUBLIC.get(name, name.split(".")[0])
                if target not in FLOORS[folder] | {folder} | EVERYWHERE:
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
        for name, node in imports_of_ours(path):
            if name.startswith("kernels"):
                seams.append(path.name)
            elif not (isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == name.split(".")[1]):
                problems.append(f"{path.name} imports {name}")
    assert problems == []
    assert seams == ["deformable_attention.py"]
