"""What the documents promise: tests that they name exist, and files that they link to."""

import argparse
import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

import mask2former_hf
from mask2former_hf.cli.main import COMMANDS
from mask2former_hf.inference.known_labels import task_of
from mask2former_hf.training.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "docs", "docs/guides", "docs/notebooks", "docs/reference", "examples", "benchmarks", "tests/golden")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def names_of_tests():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name


def differences():
    """Rows of the table of differences, as lists of cells."""
    lines = (ROOT / "docs" / "differences.md").read_text().splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]  # below the header and its rule


def test_every_difference_to_stock_names_a_test_that_exists():
    names, rows = list(names_of_tests()), differences()
    assert len(rows) >= 19
    for row in rows:
        slugs = re.findall(r"`(\w+)`", row[-1])
        assert slugs, f"no test is named for: {row[0].strip()}"
        for slug in slugs:
            assert any(slug in name for name in names), f"`pytest -k {slug}` selects nothing"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_and_headings_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):  # of the web
            continue
        file, _, heading = link.partition("#")
        target = document if not file else document.parent / unquote(file)
        assert target.exists(), f"{link} leads nowhere"
        if heading:
            assert heading in headings(target.read_text()), f"{link}: no such heading"


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)(?:\(.*\))?$", pages, flags=re.MULTILINE)
    assert sorted(named) == mask2former_hf.__all__  # each once, and none that is gone


def test_the_model_zoo_has_all_recipes_and_tells_the_task_of_every_checkpoint():
    sections = (ROOT / "docs" / "model_zoo.md").read_text().split("\n## ")[1:]
    recipes = [name for section in sections for name in re.findall(r"\| `([\w-]+)`", section)]
    assert sorted(recipes) == sorted(recipe_names())
    for section in sections:
        title = section.splitlines()[0]
        for name in re.findall(r"`(facebook/[\w-]+)`", section):
            assert "Mapillary" in title or task_of(SimpleNamespace(_name_or_path=name)) in title, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_checkpoint_that_is_named_is_in_the_model_zoo(document):
    published = re.findall(r"facebook/mask2former-[\w-]+", (ROOT / "docs" / "model_zoo.md").read_text())
    assert set(re.findall(r"facebook/mask2former-[\w-]+", document.read_text())) <= set(published)
    assert len(set(published)) == 30


def test_every_flag_that_a_page_names_exists():
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for command in COMMANDS:
        module = importlib.import_module(f"mask2former_hf.cli.{command.replace('-', '_')}")
        module.add_arguments(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for document in (ROOT / "README.md", ROOT / "docs" / "start.md", *(ROOT / "docs" / "guides").glob("*.md")):
        lines = [line for line in document.read_text().splitlines() if not line.startswith("torchrun ")]
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(lines)))
        assert named <= known, f"{document}: {sorted(named - known)}"


def headings(text):
    """Anchors as GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_file_that_the_architecture_names_exists():
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))
    missing = [
        name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "src/mask2former_hf"))
    ]
    assert len(named) > 30 and sorted(missing) == []
