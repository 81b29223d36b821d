"""Every code block of README, Start and Guides runs, on tiny checkpoints and data that are generated here."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_config
from huggingface_hub import HfApi, RepoUrl
from pages import ROOT, run_page
from PIL import Image

from mask2former_hf import ClassTable, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, ScenesDataset
from mask2former_hf.data.formats.convert import convert

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("start", "how_it_works", "hub"))]
PAGES += sorted((DOCS / "guides").glob("*.md"))


PUBLISHED = {  # end of the id -> class set; nothing else tells what a published checkpoint is for
    "coco-panoptic": "coco-panoptic",
    "coco-instance": "coco-instance",
    "ade-semantic": "ade20k-semantic",
}
FORMATS = {
    "my_data": "coco-instances",
    "my_panoptic": "coco-panoptic",
    "my_maps": "label-maps",
    "my_colours": "colour-maps",
    **{f"my_{name}": name for name in ("labelme", "yolo", "geojson", "parquet")},
    "my_label_studio": "label-studio",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """What pages name: photos, annotated images in some formats, checkpoints of the Hub."""
    folder = tmp_path_factory.mktemp("reader")
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    for end, classes in PUBLISHED.items():
        names = ClassTable.load(classes).id2label
        config = tiny_config("resnet", num_labels=len(names), id2label=names, decoder_layers=2)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / f"facebook/mask2former-swin-tiny-{end}")
        processor.save_pretrained(folder / f"facebook/mask2former-swin-tiny-{end}")
    scenes = ScenesDataset(4, size=64)
    for place, name in FORMATS.items():
        convert(scenes, folder / place, name)
    save(folder / "photo.jpg", scenes[0].image)
    for number, example in enumerate(scenes):
        save(folder / f"photos/{number}.jpg", example.image)
        things = np.isin(example.segmentation, [s["id"] for s in example.segments if s["isthing"]])
        for place, values in (("my_cells", example.segmentation * things), ("my_roads", ~things * 255)):
            save(folder / place / f"images/train/{number}.png", example.image)
            save(folder / place / f"maps/train/{number}.png", values)
    (folder / "my_roads/classes.json").write_text('{"0": "background", "255": "road"}')
    return folder


def save(path: Path, pixels: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def in_workplace(workplace, tmp_path, monkeypatch):
    """A working folder for one page, with links to what is there."""
    for entry in workplace.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """Nothing is published: the Hub takes what it is given (tests/hub publishes to one on the loopback)."""
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    commit = SimpleNamespace(commit_url="https://huggingface.co/me/model/commit/0")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: commit)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, in_workplace, hub):
    run_page(page)
