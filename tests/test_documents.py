"""What the documents promise: tests that they name exist, and files that they link to."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for folder in ("", "docs", "examples", "benchmarks", "tests/golden") for path in (ROOT / folder).glob("*.md")
)


def names_of_tests():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name


def differences():
    """Rows of README's table of differences, as lists of cells."""
    section = (
        (ROOT / "README.md").read_text().split("## Different from transformers' Mask2Former")[1].split("\n## ")[0]
    )
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]  # below the header and its rule


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
