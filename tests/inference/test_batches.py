"""`Segmenter.on_batch`: what engines for many machines hand out, and the rows that they take back."""

import json

import numpy as np
import pytest
from helpers import sure_checkpoint
from PIL import Image

from mask2former_hf import Segmenter
from mask2former_hf.data.rle import read_counts
from mask2former_hf.inference.segmentation import coco_code

COLUMNS = "image_id file_name height width label_id label score iscrowd area box counts problem".split()
AT = {"threshold": 0.1}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = sure_checkpoint(tmp_path_factory, task="instance", num_queries=20)
    return Segmenter(folder, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images, the second damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("a.png", (60, 90)), ("b.png", (8, 8)), ("c.png", (60, 90))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b.png").write_bytes(b"no picture")
    return [str(folder / name) for name in ("a.png", "b.png", "c.png")]


def by_row(columns):
    assert list(columns) == COLUMNS and len({len(column) for column in columns.values()}) == 1
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_a_row_for_each_segment_and_one_for_an_image_that_cannot_be_read(segmenter, files):
    rows = by_row(segmenter.on_batch({"path": files}, image="path", **AT))
    assert [row["image_id"] for row in rows if row["problem"]] == [files[1]]
    assert "not a readable image" in rows[[row["image_id"] for row in rows].index(files[1])]["problem"]
    for file in (files[0], files[2]):
        result, own = segmenter(file, **AT), [row for row in rows if row["image_id"] == file]
        assert result.segments and len(own) == len(result.segments)
        for row, segment, runs in zip(own, result.segments, result.runs, strict=True):
            assert (row["label_id"], row["label"], row["score"]) == (segment.label_id, segment.label, segment.score)
            assert (row["area"], row["box"]) == (segment.area, list(segment.box))
            code = {"size": [row["height"], row["width"]], "counts": row["counts"]}
            assert code == coco_code(runs, result.size)
            assert read_counts(code, "row")[1::2].sum() == segment.area


def test_every_form_of_a_column_gives_the_same_rows(segmenter, files):
    file = files[0]
    with open(file, "rb") as opened:
        content = opened.read()
    pixels = np.asarray(Image.open(file))
    expected = by_row(segmenter.on_batch({"image": [file]}, [5], **AT))
    assert {row["image_id"] for row in expected} == {"5"}
    for column in (
        [content],
        [bytearray(content)],
        [Image.open(file)],
        pixels[None],
        [pixels.tolist()],
        [{"bytes": content, "path": file}],
        [{"bytes": None, "path": file}],
    ):
        rows = by_row(segmenter.on_batch({"image": column}, [5], **AT))
        assert [{**row, "file_name": ""} for row in rows] == [{**row, "file_name": ""} for row in expected]
    named = by_row(segmenter.on_batch({"content": [content], "key": ["x"]}, image="content", image_id="key", **AT))
    assert {row["image_id"] for row in named} == {"x"} and len(named) == len(expected)


def test_images_without_an_id_and_columns_that_are_not_there_are_refused(segmenter):
    with pytest.raises(ValueError, match="image='image': the batch has the columns photo; name one"):
        segmenter.on_batch({"photo": []})
    with pytest.raises(ValueError, match=r"image_id=None: images need an id; name the column that has it \(image\)"):
        segmenter.on_batch({"image": np.zeros((1, 8, 8, 3), dtype=np.uint8)})
    with pytest.raises(TypeError, match="images is a dict of image: on_batch takes such"):
        segmenter({"image": []})


def test_datasets_map_takes_it_with_processes_and_with_images_that_it_does_not_decode(segmenter, files):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image(decode=False))
    found = data.map(
        segmenter.on_batch,
        batched=True,
        batch_size=2,
        remove_columns=data.column_names,
        features=datasets.Features.from_arrow_schema(segmenter.batch_schema()),
        fn_kwargs=AT,
    )
    assert json.loads(json.dumps(found[:])) == segmenter.on_batch({"image": files}, **AT)
