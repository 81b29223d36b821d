"""Tiles of a large image: where they lie, how they are read, and that what they saw becomes one result."""

import json
import random

import numpy as np
import pytest
from helpers import tiny_model
from PIL import Image
from scipy import ndimage

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.data.runs import Runs
from mask2former_hf.data.scenes import STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.data.windows import ImageWindows, RasterWindows
from mask2former_hf.inference.rules import Rules
from mask2former_hf.inference.tile_merging import VOID, Thing, TileMerger, TileResult, merge_things, segment_tiles
from mask2former_hf.inference.tiles import plan_tiles

SIZES = [(100, 250), (64, 64), (65, 300), (700, 70)]


def rules(task, num_labels=5):
    return Rules(task, {label: str(label) for label in range(num_labels)}, (3, 4), False, 0.5)


def draw(windows, size):
    counts = np.zeros(size, dtype=int)
    for left, top, right, bottom in windows:
        counts[top:bottom, left:right] += 1
    return counts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.2, 0.5])
def test_tiles_cover_the_image_and_every_pixel_has_one_owner_and_one_last_tile(size, overlap):
    plan = plan_tiles(size, 64, overlap)
    windows = [plan.window(n) for n in range(len(plan))]
    assert draw(windows, size).min() == 1 and all(
        (right - left, bottom - top) == (min(64, size[1]), min(64, size[0])) for left, top, right, bottom in windows
    )
    for part in (plan.own, plan.done):
        assert (draw([part(n) for n in range(len(plan))], size) == 1).all()
    for spans in (plan.rows, plan.columns):
        assert all(one.stop - two.start >= round(64 * overlap) for one, two in zip(spans, spans[1:], strict=False))
    last = np.zeros(size, dtype=int)
    for number, (left, top, right, bottom) in enumerate(windows):
        last[top:bottom, left:right] = number
        assert plan.weights(number).min() > 0
    for number in range(len(plan)):
        left, top, right, bottom = plan.done(number)
        assert (last[top:bottom, left:right] == number).all()
        owners = {n for n in range(len(plan)) if draw([plan.own(n)], size)[top:bottom, left:right].any()}
        assert set(plan.owners((left, top, right, bottom))) == owners


def test_pixels_are_owned_by_the_tile_whose_middle_is_nearest():
    plan = plan_tiles((200, 200), 64, 0.3)
    middles = np.array([((b + t) / 2, (r + x) / 2) for x, t, r, b in map(plan.window, range(len(plan)))])
    for number in range(len(plan)):
        left, top, right, bottom = plan.own(number)
        for y, x in ((top + 0.5, left + 0.5), (bottom - 0.5, right - 0.5)):
            distance = abs(middles - (y, x)).max(1)
            assert distance[number] <= distance.min() + 0.5


@pytest.mark.parametrize(
    "tile, overlap, message",
    [(16, 0.2, "tile=16: must be a side of at least 32"), (64, 0.6, "overlap=0.6"), ("all", 0.2, "tile='all'")],
)
def test_bad_tiles_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        plan_tiles((100, 100), tile, overlap)


# --- merging: tiles that see the truth, whose ids are the image's red and green ---


def coloured(ids):
    return np.stack([ids & 255, ids >> 8, ids * 0], -1).astype(np.uint8)


def sees_truth(labels, task="panoptic", shift=0, seed=0):
    """A `find`: every connected part of a tile's ids is a thing, moved by up to `shift` pixels."""
    rng = np.random.default_rng(seed)

    def look(tile):
        ids = tile[..., 0] + 256 * tile[..., 1].astype(int)
        things, stuff = [], [label for label in STUFF_LABEL_IDS if label in labels.values()]
        scores = np.zeros((1 + len(stuff), *ids.shape), dtype=np.float32)
        scores[0] = 0.1
        for number in np.unique(ids[ids > 0]).tolist():
            mask = ids == number
            if labels[number] in stuff:
                scores[1 + stuff.index(labels[number])][mask] = 0.9
                continue
            parts, count = ndimage.label(mask)
            for part in range(1, count + 1):
                moved = ndimage.shift(parts == part, rng.integers(-shift, shift + 1, 2), order=0, mode="nearest")
                things.append(Thing(labels[number], float(rng.uniform(0.8, 1)), Runs.of_mask(moved)))
        if task == "instance":
            return TileResult(things)
        return TileResult(things, [VOID, *stuff], scores, dict.fromkeys(stuff, 0.9))

    return lambda tiles: map(look, tiles)


@pytest.fixture(scope="module")
def ids():
    """A map of 57 discs that do not touch, and a U, a ring and a bar that are larger than a tile."""
    rng, (H, W) = np.random.default_rng(0), (250, 300)
    ids, (y, x) = np.zeros((H, W), dtype=int), np.mgrid[:H, :W]
    ids[20:150, 20:30] = ids[20:150, 90:100] = ids[140:150, 20:100] = 1
    distance = np.hypot(y - 110, x - 200)
    ids[(distance < 75) & (distance > 60)] = 2
    ids[230:240, 5 : W - 5] = 3
    while ids.max() < 60:
        distance, radius = np.hypot(y - rng.uniform(0, H), x - rng.uniform(0, W)), rng.uniform(5, 12)
        if not ids[distance < radius + 3].any() and (distance < radius).any():
            ids[distance < radius] = ids.max() + 1
    return ids


def result_of_truth(ids, labels, task="panoptic", tile=64, overlap=0.25, **how):
    plan = plan_tiles(ids.shape, tile, overlap)
    return segment_tiles(ImageWindows(coloured(ids)), plan, rules(task), sees_truth(labels, task, **how), batch_size=3)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_tiles_that_see_the_truth_give_it_also_of_objects_larger_than_a_tile(ids, task):
    found = result_of_truth(ids, {number: number % 3 for number in range(1, ids.max() + 1)}, task)
    assert len(found.segments) == ids.max() == 60
    for segment, mask in zip(found.segments, found.masks, strict=True):
        (number,) = np.unique(ids[mask])
        assert (mask == (ids == number)).all() and segment.label_id == number % 3 and 0.8 <= segment.score <= 1


def test_a_panoptic_scene_comes_back_pixel_by_pixel():
    scene = ScenesDataset(1, size=(200, 260), seed=5, num_things=(20, 20), noise=0)[0]
    labels = {segment["id"]: segment["category_id"] for segment in scene.segments}
    found = result_of_truth(scene.segmentation, labels)
    seen = np.zeros(scene.size, dtype=int)
    for segment, mask in zip(found.segments, found.masks, strict=True):
        seen[mask] = segment.label_id + 1
    truth = np.vectorize(labels.get)(scene.segmentation) + 1
    assert (seen == truth).all() and (found.map > 0).all()


def test_things_that_tiles_see_a_little_apart_are_still_one(ids):
    found = result_of_truth(ids, {number: 0 for number in range(1, ids.max() + 1)}, shift=1, seed=3)
    assert len(found.segments) == ids.max()
    assert (found.map > 0)[ids > 0].mean() > 0.9  # a disc of 12 pixels moved by one loses a tenth


def test_the_order_of_tiles_changes_nothing(ids):
    plan, image = plan_tiles(ids.shape, 64, 0.25), coloured(ids)
    find, things = sees_truth({number: 0 for number in range(1, ids.max() + 1)}, shift=2), {}
    for number in range(len(plan)):
        left, top, right, bottom = plan.window(number)
        (found,) = find([image[top:bottom, left:right]])
        things[number] = [thing._replace(runs=thing.runs.moved(left, top)) for thing in found.things]
    expected = merge_things(things, plan, any_label=True)
    shuffled = list(things)
    random.Random(1).shuffle(shuffled)
    again = merge_things({number: things[number][::-1] for number in shuffled}, plan, any_label=True)
    assert [(thing.label, thing.own.box, thing.own.area, thing.beyond.area) for thing in again] == [
        (thing.label, thing.own.box, thing.own.area, thing.beyond.area) for thing in expected
    ]
    assert [thing.score for thing in again] == pytest.approx([thing.score for thing in expected])


def boxes(plan, **tiles):
    """Things of label 0 from boxes in the image, of tiles t0, t1, ..."""
    return {
        int(name[1:]): [
            Thing(0, 0.9 - 0.1 * n, Runs.of_mask(np.ones((bottom - top, right - left))).moved(left, top))
            for n, (left, top, right, bottom) in enumerate(found)
        ]
        for name, found in tiles.items()
    }


def test_a_part_that_its_tiles_edge_cuts_joins_what_contains_it_and_a_complete_thing_does_not():
    plan = plan_tiles((64, 100), 64, 0.4)  # two tiles: columns 0 to 64, and 36 to 100
    cut = boxes(plan, t0=[(58, 10, 64, 20)], t1=[(52, 5, 90, 40)])
    assert len(merge_things(cut, plan, any_label=True)) == 1
    complete = boxes(plan, t0=[(42, 10, 48, 20)], t1=[(40, 5, 90, 40)])
    assert len(merge_things(complete, plan, any_label=True)) == 2


def test_what_one_tile_sees_alone_stays_whole_if_most_of_it_is_its_own_and_goes_otherwise():
    plan = plan_tiles((64, 100), 64, 0.4)  # the seam is column 50
    mine, other = (44, 5, 54, 15), (48, 30, 58, 40)
    (kept,) = merge_things(boxes(plan, t0=[mine, other]), plan, any_label=True)
    assert kept.own.box == (44, 5, 50, 15) and kept.beyond.box == (50, 5, 54, 15)


def test_the_score_is_the_mean_over_the_pixels_that_the_parts_decide_and_the_larger_vote_names_the_class():
    plan = plan_tiles((64, 100), 64, 0.4)
    things = boxes(plan, t0=[(20, 0, 64, 10)], t1=[(36, 0, 60, 10)])  # decide 30 and 10 columns
    things[1] = [thing._replace(score=0.5) for thing in things[1]]
    (found,) = merge_things(things, plan, any_label=True)
    assert found.score == pytest.approx((300 * 0.9 + 100 * 0.5) / 400)
    things[1] = [thing._replace(label=1) for thing in things[1]]
    (found,) = merge_things(things, plan, any_label=True)
    assert found.label == 0 and found.score == pytest.approx(0.9)
    things = boxes(plan, t0=[(20, 0, 64, 10)], t1=[(36, 0, 90, 10)])
    things[1] = [thing._replace(label=1) for thing in things[1]]
    assert [thing.label for thing in merge_things(things, plan, any_label=False)] == [0, 1]


@pytest.mark.parametrize("size", [(100, 250), (65, 300)])
def test_semantic_scores_are_averaged_by_weight_where_tiles_overlap(size):
    plan, rng = plan_tiles(size, 64, 0.4), np.random.default_rng(0)
    merger, total = TileMerger(plan, rules("semantic")), np.zeros((5, *size))
    for number in range(len(plan)):
        left, top, right, bottom = plan.window(number)
        scores = rng.random((5, bottom - top, right - left)).astype(np.float32)
        total[:, top:bottom, left:right] += scores * plan.weights(number)
        merger.add(number, TileResult(labels=range(5), scores=scores))
    assert (merger.result().map == total.argmax(0)).mean() > 0.9999


def test_scores_wait_only_in_the_strips():
    plan = plan_tiles((500, 500), 64, 0.2)
    merger = TileMerger(plan, rules("semantic"))
    for number in range(len(plan)):
        merger.add(number, TileResult(labels=range(5), scores=np.ones((5, 64, 64), dtype=np.float32)))
        waiting = sum(part.scores.size for part in merger._strips._waiting)
        assert waiting <= 5 * 20 * (500 + len(plan.columns) * 20 + 2 * 64)


# --- with a network ---


@pytest.fixture(scope="module")
def network():
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=12)
    model.class_predictor.weight.data *= 30
    return model, Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


def photo(size, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_a_segmenter_makes_tiles_of_large_images_alone_and_the_batch_does_not_matter(network, task):
    whole, tiled = Segmenter.of(*network, task=task), Segmenter.of(*network, task=task, tile=64)
    small, large = photo((60, 64)), photo((100, 150))
    numbers = {} if task == "semantic" else {"threshold": 0.1}
    assert (tiled(small, **numbers).map == whole(small, **numbers).map).all()
    one, three = tiled(large, **numbers), next(tiled(iter([large]), batch_size=3, **numbers))
    assert one.size == (100, 150) and one.segments and (one.map == three.map).mean() > 0.999
    seen = []
    tiled._tile_results, plain = lambda tiles, rules: seen.extend(tiles) or plain(tiles, rules), tiled._tile_results
    tiled(large)
    assert len(seen) == 6


def test_auto_takes_whole_what_the_processor_does_not_shrink(network):
    segmenter = Segmenter.of(*network, tile="auto")
    assert segmenter.tile == 64
    whole = Segmenter.of(*network)
    assert (segmenter(photo((64, 96))).map == whole(photo((64, 96))).map).all()
    seen = []
    segmenter._tile_results, plain = (
        lambda tiles, rules: seen.extend(tiles) or plain(tiles, rules),
        segmenter._tile_results,
    )
    segmenter(photo((64, 97)))
    assert [tile.shape for tile in seen] == [(64, 64, 3)] * 2


@pytest.mark.parametrize("options", [{"tta": True, "task": "semantic"}, {"tta": True}, {"refine": "otsu"}])
def test_tiles_go_with_refinement_and_augmentation(network, options):
    pytest.importorskip("skimage")
    model, processor = network[0], Mask2FormerImageProcessor(size={"shortest_edge": 128, "longest_edge": 256})
    numbers = {} if options.get("task") == "semantic" else {"threshold": 0.1}
    found = Segmenter.of(model, processor, tile=64, **options)(photo((64, 90)), **numbers)
    assert found.size == (64, 90) and found.segments


# --- files ---


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    rasterio = pytest.importorskip("rasterio")
    path, pixels = tmp_path_factory.mktemp("raster") / "field.tif", photo((150, 200))
    profile = {"driver": "GTiff", "height": 150, "width": 200, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64, "BIGTIFF": "YES", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=rasterio.Affine(0.5, 0, 4000, 0, -0.5, 7000), **profile) as file:
        file.write(pixels.transpose(2, 0, 1))
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    return path, pixels


def test_windows_of_a_raster_are_those_of_the_image(raster):
    path, pixels = raster
    windows = RasterWindows(path)
    assert windows.size == (150, 200)
    assert (windows.read((30, 20, 150, 90)) == pixels[20:90, 30:150]).all()
    assert windows.georeference.transform == (0.5, 0, 4000, 0, -0.5, 7000) and windows.georeference.epsg == 32632


def test_a_level_of_the_pyramid_has_its_own_size_and_transform(raster):
    path, pixels = raster
    windows = RasterWindows(path, level=1)
    assert windows.size == (75, 100) and windows.georeference.transform == (1, 0, 4000, 0, -1, 7000)
    with pytest.raises(ValueError, match="level=2: the file has the levels 0 to 1"):
        RasterWindows(path, level=2)


def test_every_door_reads_the_level_that_is_asked_for(network, raster, tmp_path, capsys):
    (model, processor), (path, pixels) = network, raster
    expected = Segmenter.of(model, processor, tile=64)(pixels[::2, ::2], threshold=0.1)
    found = Segmenter.of(model, processor, tile=64, level=1)(path, threshold=0.1)
    assert (found.map == expected.map).all() and found.georeference.transform == (1, 0, 4000, 0, -1, 7000)

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.fromarray(pixels).save(tmp_path / "no_levels.png")
    command = ["predict", str(path), str(tmp_path / "no_levels.png"), "--model", str(tmp_path / "model")]
    command += ["--task", "instance", "--threshold", "0.1", "--output", str(tmp_path / "out")]
    assert main([*command, "--tile", "64", "--level", "1"]) == 2
    assert "no_levels.png: level=1: levels are those of TIFFs that rasterio reads" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert {tuple(entry["segmentation"]["size"]) for entry in written} == {(75, 100)}
    assert main([*command, "--tile", "64"]) == 2
    assert "level was 1 and is 0" in capsys.readouterr().err
    for options, problem in [
        (["--level", "2", "--tile", "64"], "--level 2: none of the 2 images has it, the highest is 1;"),
        (["--level", "1"], "--level 1: only tiles are read from levels"),
        (["--level", "-1", "--tile", "64"], "--level -1: must be that of a pyramid"),
    ]:
        assert main([*command, "--overwrite", *options]) == 2
        assert problem in capsys.readouterr().err
    (tmp_path / "no_tiff.tif").write_bytes(b"II*")
    command[1:3] = [str(tmp_path / name) for name in ("no_levels.png", "no_tiff.tif")]
    assert main([*command, "--overwrite", "--tile", "64", "--level", "1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mask2former-hf predict" in line]
    assert "--level 1: none of the 2 images has it, they have no pyramid" in line


def test_a_large_raster_is_read_by_windows_and_keeps_its_place(network, raster, monkeypatch):
    path, pixels = raster
    segmenter, read = Segmenter.of(*network, tile=64), []
    plain = RasterWindows.read
    monkeypatch.setattr(
        RasterWindows, "read", lambda self, window, step=1: read.append(window) or plain(self, window, step)
    )
    found = segmenter(path, threshold=0.1)
    assert found.georeference.epsg == 32632 and max(right - left for left, _, right, _ in read) == 64
    assert (found.map == segmenter(pixels, threshold=0.1).map).all()


def test_a_damaged_raster_is_left_out_and_the_next_image_read(network, raster, tmp_path, capsys):
    (model, processor), (path, _) = network, raster
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    broken = tmp_path / "broken.tif"
    broken.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    floats = tmp_path / "floats.tif"
    Image.fromarray(np.zeros((150, 200), np.float32)).save(floats)
    given = ["--model", str(tmp_path / "model"), "--task", "instance", "--device", "cpu", "--tile", "64"]
    assert main(["predict", str(broken), str(floats), str(path), *given, "--output", str(tmp_path / "out")]) == 2
    assert [file.name for file in (tmp_path / "out" / "overlays").iterdir()] == [f"{path.stem}.png"]
    said = capsys.readouterr().err
    assert "broken.tif" in said and "floats.tif" in said and "Traceback" not in said


def test_predict_in_tiles_writes_what_the_segmenter_gives(network, raster, tmp_path, capsys):
    (model, processor), (path, _) = network, raster
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = ["predict", str(path), "--model", str(tmp_path / "model"), "--task", "instance", "--device", "cpu"]
    given += ["--threshold", "0.1", "--output", str(tmp_path / "out")]
    assert main([*given, "--tile", "64", "--overlap", "0.3", "--batch-size", "2"]) == 0
    found = Segmenter.of(model, processor, task="instance", tile=64, overlap=0.3)(path, batch_size=2, threshold=0.1)
    written = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [{**entry, "file_name": "field.tif"} for entry in found.to_coco(1)] == written
    assert main([*given, "--overwrite", "--overlap", "0.7"]) == 2
    assert "--overlap 0.7: must be between 0 and 0.5" in capsys.readouterr().err
    for command in ([*given, "--overwrite"], ["evaluate", "--model", str(tmp_path), "--data", "scenes"]):
        assert main([*command, "--overlap", "0.2"]) == 2
        assert "--overlap 0.2: only tiles overlap; add --tile, or leave it out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="overlap=0.3: only tiles overlap; give tile"):
        Segmenter.of(model, processor, overlap=0.3)
