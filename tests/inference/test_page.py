"""What the page shows and offers, what it says of bad uploads, and what a Space is made of."""

import configparser
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import tiny_model
from PIL import Image

from mask2former_hf import CocoInstances, Mask2FormerImageProcessor, ScenesDataset, Segmenter
from mask2former_hf.cli.app import REQUIREMENTS, write_space
from mask2former_hf.cli.main import UserError, main
from mask2former_hf.data.polygons import fill_polygons
from mask2former_hf.inference import page, page_content
from mask2former_hf.inference.segmentation import instance_result, panoptic_result, semantic_result

SVG = "{http://www.w3.org/2000/svg}"
COPY_A_PICTURE = """async () => {
  const canvas = new OffscreenCanvas(60, 40);
  canvas.getContext('2d').fillRect(10, 10, 20, 20);
  const picture = await canvas.convertToBlob({type: 'image/png'});
  await navigator.clipboard.write([new ClipboardItem({'image/png': picture})]);
}"""
NAMES = {0: "cat", 1: '<script>alert("no")</script> & dog'}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def instances():
    """A square with a hole, and a bar that it hides in part."""
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:25, 10:30] = True
    masks[0, 10:15, 15:20] = False
    masks[1, 20:30, 25:55] = True
    return instance_result(masks, [0.9, 0.625], [0, 1], NAMES)


@pytest.fixture(scope="module")
def segmenter():
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return Segmenter.of(model, processor)


@pytest.fixture
def photo(image, tmp_path):
    Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def svg_of(html):
    return ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + len("</svg>")])


def rings_of(path):
    return [
        np.array([[float(number) for number in point.split(",")] for point in ring.split()])
        for ring in re.findall("M([^Z]*)Z", path.get("d"))
    ]


def test_every_segment_says_what_it_is_and_the_best_instance_lies_on_top(instances, image):
    html = page_content.hover_overlay(instances, image)
    areas = instances.masks.sum((1, 2))
    said = {path.get("class"): path.get("aria-label") for path in svg_of(html).iter(f"{SVG}path")}
    texts = [f"cat, score 0.90, {areas[0]} pixels", f"{NAMES[1]}, score 0.62, {areas[1]} pixels"]
    assert list(said.items()) == [("s1", texts[1]), ("s0", texts[0])]
    captions = re.findall(r'<span class="(s\d+)"><b style="background: (#\w{6})"></b>(.*?)</span>', html)
    assert [(name, unescape(text)) for name, _, text in captions] == [("s0", texts[0]), ("s1", texts[1])]
    for name, colour, _ in captions:
        assert f".shown:has(path.{name}:is(:hover, :focus-visible)) span.{name} " in html
        assert f'fill="{colour}"' in html


def test_outlines_cover_their_masks_with_holes(instances, image):
    paths = list(svg_of(page_content.hover_overlay(instances, image)).iter(f"{SVG}path"))[::-1]
    for path, mask in zip(paths, instances.masks, strict=True):
        filled = fill_polygons(rings_of(path), mask.shape)
        assert (filled & mask).sum() / (filled | mask).sum() > 0.95


def test_names_of_classes_are_text_and_never_html(instances, image):
    html = page_content.hover_overlay(instances, image)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<b>" not in page_content.message("<b>bold</b>")


def test_a_large_image_is_shown_small_with_the_areas_of_the_whole():
    labels = np.zeros((3000, 1500), int)
    labels[1500:] = 1
    html = page_content.hover_overlay(semantic_result(labels, NAMES), np.zeros((3000, 1500, 3), np.uint8))
    svg = svg_of(html)
    assert max(map(int, svg.get("viewBox").split())) <= page_content.SHOWN_SIDE
    assert svg.find(f"{SVG}path").get("aria-label") == "cat, 2250000 pixels"


def test_the_table_has_a_row_for_each_segment(instances):
    assert page_content.table_rows(instances) == [
        [1, "cat", 0.9, 375, "10, 5, 30, 25"],
        [2, NAMES[1], 0.625, 300, "25, 20, 55, 30"],
    ]


def test_downloads_are_read_back_as_the_same_masks(instances, image, tmp_path):
    files = {file.name: file for file in page_content.write_downloads(tmp_path, instances, image)}
    assert np.array_equal(np.asarray(Image.open(files["image.png"])), image)
    assert Image.open(files["segments.png"]).size >= (60, 40)
    example = CocoInstances(tmp_path, files["coco.json"])[0]
    assert np.array_equal(example.image, image)
    content = json.loads(files["coco.json"].read_text())
    assert [row["name"] for row in content["categories"]] == list(NAMES.values())
    assert [row["area"] for row in content["annotations"]] == [375, 300]
    features = json.loads(files["segments.geojson"].read_text())["features"]
    shapes = json.loads(files["labelme.json"].read_text())
    assert shapes["imagePath"] == "image.png"
    for mask, feature, shape in zip(instances.masks, features, shapes["shapes"], strict=True):
        polygons = feature["geometry"]["coordinates"]
        rings = polygons if feature["geometry"]["type"] == "Polygon" else [ring for part in polygons for ring in part]
        assert np.array_equal(fill_polygons([np.array(ring)[:-1] for ring in rings], mask.shape), mask)
        assert np.array_equal(fill_polygons([np.array(shape["points"])], mask.shape), mask)


def test_every_task_can_be_shown_and_downloaded(image, tmp_path):
    ids = np.ones((40, 60), int)
    ids[:, 30:] = 2
    segments = [{"id": number, "label_id": number - 1, "score": 0.75} for number in (1, 2)]
    for result in (panoptic_result(ids, segments, NAMES), semantic_result(ids - 1, NAMES)):
        assert page_content.hover_overlay(result, image).count("<path ") == 2
        assert len(page_content.write_downloads(tmp_path, result, image)) == 5


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nnonsense", None])
def test_a_damaged_upload_gets_one_message_without_a_path(content, photo):
    photo.write_bytes(photo.read_bytes()[:2000] if content is None else content)
    with pytest.raises(page_content.UnusableImage, match=r"^photo\.png cannot be read as an image") as caught:
        page_content.read_upload(photo)
    assert str(photo.parent) not in str(caught.value)


def test_an_upload_that_is_too_large_is_refused_before_it_is_decoded(photo, monkeypatch):
    photo.write_bytes(photo.read_bytes()[:500])  # the header
    with pytest.raises(page_content.UnusableImage, match="60 x 40 pixels, and this page takes 0.002 million"):
        page_content.read_upload(photo, most_pixels=2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses twice as many
    with pytest.raises(page_content.UnusableImage, match="more than 2000 pixels, and this page takes"):
        page_content.read_upload(photo)


def test_an_answer_has_overlay_table_and_files(segmenter, photo):
    for html, rows, files in page.answer(segmenter, photo, "semantic", 0.5, "none", "none"):
        assert html.count("<path ") == len(rows) > 0
        assert all(Path(file).is_file() for file in files)
    assert not Path(files[0]).exists()  # the page has its own copies by then


def test_what_cannot_be_answered_is_a_message(segmenter, photo):
    for options, text in (
        (("panoptic", 1.0, "none", "none"), "No segment"),
        (("semantic", 0.5, "otsu", "none"), "semantic results have no threshold"),
        (("panoptic", 0.5, "none", "big"), "Tile big: must be none, auto, or a number"),
    ):
        ((html, rows, files),) = page.answer(segmenter, photo, *options)
        assert text in html and not rows and not files
    assert list(page.answer(segmenter, None, "panoptic", 0.5, "none", "none")) == [("", [], [])]


def test_without_gradio_the_repair_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install gradio"):
        page.load_gradio()
    assert main(["app", "--model", "nowhere"]) == 2
    assert "'.[app]' in a clone, elsewhere pip install gradio shapely" in capsys.readouterr().err


def test_a_space_has_what_it_needs_and_nothing_of_this_machine(tmp_path):
    folder = tmp_path / "space"
    write_space(folder, "user/model", "6.31.0")
    app = (folder / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert 'load_segmenter("user/model")' in app
    header = (folder / "README.md").read_text().split("---\n")[1]
    assert "sdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\nmodels:\n- user/model\n" in header
    assert not any(
        str(tmp_path) in (folder / name).read_text() for name in ("app.py", "README.md", "requirements.txt")
    )
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mask2former_hf; print(mask2former_hf.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=folder, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).parent == folder / "mask2former_hf"


def test_a_space_needs_what_the_package_and_its_extra_need(tmp_path):
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    needed = settings["options"]["install_requires"] + settings["options.extras_require"]["app"]
    assert list(REQUIREMENTS) == needed.split()


def test_a_space_replaces_nothing_and_needs_a_published_model(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already and is kept"):
        write_space(tmp_path, "user/model", "6.31.0")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    for model in (str(tmp_path), "a checkpoint"):
        with pytest.raises(UserError, match="loads its checkpoint from the Hub"):
            write_space(tmp_path / "space", model, "6.31.0")


def test_in_the_browser_an_upload_a_change_of_task_and_a_download(segmenter, serve, browser, photo, tmp_path):
    Image.fromarray(ScenesDataset(1, size=64)[0].image).save(tmp_path / "scene.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    view, outside = browser.new_page(), []
    view.on("request", lambda request: outside.append(request.url))
    view.set_default_timeout(20000)
    address = serve(segmenter, examples=[photo])
    view.goto(address)
    view.locator("#task").get_by_label("semantic").check()
    view.set_input_files("#image input[type=file]", tmp_path / "scene.png")
    view.wait_for_selector("#overlay .shown path", state="attached")
    captions = view.locator("#overlay .captions span")
    assert all(re.fullmatch(r".+, \d+ pixels", caption) for caption in captions.all_text_contents())
    assert not any(caption.is_visible() for caption in captions.all())
    view.locator("#overlay .shown path").first.focus()
    view.keyboard.press("Tab")  # as hovering, but a segment of a model that has learnt nothing may have no middle
    assert sum(caption.is_visible() for caption in captions.all()) == 1
    with view.expect_download() as download:
        view.locator("#files a[download='coco.json']").click()
    assert json.loads(Path(download.value.path()).read_text())["images"][0]["height"] == 64
    view.get_by_label("Tile (pixels)").fill("big")
    view.locator("#task").get_by_label("panoptic").check()
    view.wait_for_selector("#overlay .message")
    view.locator("#image button[aria-label*=emove]").click()
    view.set_input_files("#image input[type=file]", tmp_path / "damaged.png")
    view.get_by_text("damaged.png cannot be read as an image").wait_for()
    assert not [url for url in outside if not url.startswith((address, "data:", "blob:"))]


def test_in_the_browser_the_clipboard_and_the_webcam_give_images(segmenter, serve, browser):
    view = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"]).new_page()
    view.set_default_timeout(20000)
    view.goto(serve(segmenter))
    view.locator("#task").get_by_label("semantic").check()
    view.evaluate(COPY_A_PICTURE)
    view.get_by_label("Paste from clipboard").click()
    view.wait_for_selector("#overlay .shown path", state="attached")
    assert view.locator("#overlay svg").get_attribute("viewBox") == "0 0 60 40"
    view.locator("#image button[aria-label*=emove]").click()
    view.wait_for_selector("#overlay .shown", state="detached")
    view.get_by_label("Capture from camera").first.click()
    view.get_by_text("Click to Access Webcam").click()
    view.wait_for_function("document.querySelector('#image video')?.currentTime > 0")
    view.get_by_label("capture photo").click()
    view.wait_for_selector("#overlay .shown path", state="attached")
