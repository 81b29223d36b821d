"""Every code block of README and docs runs, on tiny checkpoints and data that are generated here."""

from functools import partial
from types import SimpleNamespace

import pytest
from helpers import make_small_heads
from huggingface_hub import HfApi, RepoUrl
from pages import ROOT, blocks, check_block, run_page, unmarked_commands
from tiny_backbones import backbone_config
from workplace import PUBLISHED_BACKBONES, make_workplace

from mask2former_hf.training import backbones

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]
COMMANDS_NOT_RUN = [place for page in PAGES for place in unmarked_commands(page)]
PAGES = [page for page in PAGES if blocks(page)]
NOT_RUN = {f"{page.relative_to(ROOT)}:{b.line}": b for page in PAGES for b in blocks(page) if b.reason is not None}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    make_workplace(folder)
    return folder


@pytest.fixture
def in_workplace(workplace, tmp_path, monkeypatch):
    """A working folder for one page, with links to what is there."""
    for entry in workplace.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")


@pytest.fixture
def small_architectures(monkeypatch):
    """Backbones of short names and new heads are small, as the checkpoints of the Hub are here."""
    for weights, (name, family) in PUBLISHED_BACKBONES.items():
        small = backbones.Backbone(partial(backbone_config, family), weights)
        monkeypatch.setitem(backbones.BACKBONES, name, small)
    make_small_heads(monkeypatch)


@pytest.fixture
def hub(monkeypatch):
    """Nothing is published: the Hub takes what it is given (tests/hub publishes to one on the loopback)."""
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    commit = SimpleNamespace(commit_url="https://huggingface.co/me/model/commit/0")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: commit)


def test_commands_stand_in_blocks_of_bash():
    assert not COMMANDS_NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, in_workplace, small_architectures, hub):
    run_page(page)


@pytest.mark.parametrize("block", NOT_RUN.values(), ids=NOT_RUN)
def test_a_block_that_is_not_run_says_why_and_has_flags_that_exist(block):
    check_block(block)
    pytest.skip(f"looked at only: {block.reason}")
