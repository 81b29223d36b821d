"""What is wrong with a COCO json or its images is named, with file and place."""

import json

import numpy as np
import pytest
from PIL import Image

from mask2former_hf.data.coco import CocoPanoptic


def coco_json(folder, **changes):
    """A valid panoptic data set of one image in `folder`, with the json changed."""
    (folder / "pan").mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), 200, np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((4, 5, 3), [1, 0, 0], np.uint8)).save(folder / "pan" / "a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "segments_info": [{"id": 1, "category_id": 7}]}],
        "categories": [{"id": 7, "name": "sky", "isthing": 0}],
    }
    path = folder / "panoptic.json"
    path.write_text(json.dumps(data | changes))
    return folder, path, folder / "pan"


def test_a_missing_image_is_not_replaced_by_its_own_map_or_by_another_image(tmp_path):
    assert CocoPanoptic(*coco_json(tmp_path))[0].image.max() == 200
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images .* a.png"):
        CocoPanoptic(*coco_json_without_image(tmp_path))
    (tmp_path / "c").mkdir()
    Image.fromarray(np.full((4, 5, 3), 9, np.uint8)).save(tmp_path / "c" / "1.png")
    files = [{"id": 1, "file_name": "x/1.png"}, {"id": 2, "file_name": "y/1.png"}]
    entries = [{"image_id": i, "file_name": "a.png", "segments_info": []} for i in (1, 2)]
    with pytest.raises(FileNotFoundError, match="2 of 2 images"):
        CocoPanoptic(*coco_json_without_image(tmp_path, images=files, annotations=entries))


def coco_json_without_image(folder, **changes):
    arguments = coco_json(folder, **changes)
    (folder / "a.png").unlink()
    return arguments


ENTRY = {"image_id": 1, "segments_info": [{"id": 1, "category_id": 7}]}


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"categories": [{"id": 7, "isthing": 0}]}, "needs a whole number id and a name"),
        ({"categories": [{"id": 7, "name": "sky", "isthing": "0"}]}, "isthing='0'"),
        ({"annotations": [None]}, r"annotations\[0\] is None"),
        ({"annotations": [ENTRY, ENTRY]}, "image_id 1 twice"),
        ({"annotations": [{"image_id": 1, "segments_info": None}]}, "segments_info=None"),
        ({"annotations": [{"image_id": 1, "segments_info": [{"id": 1}]}]}, "has no category_id"),
        ({"images": [{"id": 1, "file_name": None}]}, "file_name=None"),
    ],
)
def test_mistakes_in_a_json_are_named_with_file_and_place(tmp_path, changes, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        CocoPanoptic(*coco_json(tmp_path, **changes))
    assert "panoptic.json" in str(caught.value)


def test_a_damaged_image_is_named(tmp_path):
    reader = CocoPanoptic(*coco_json(tmp_path))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[12:16] = b"\xff\xff\xff\xff"  # the name of the first chunk
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: not a readable image"):
        reader.check(progress=False)
