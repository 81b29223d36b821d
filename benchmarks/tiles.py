"""Large images in overlapping tiles: what comes out as one, what it costs, and how it compares with the whole image.

    python benchmarks/tiles.py merging [--sizes 512 1024 ...]
    python benchmarks/tiles.py network --model CHECKPOINT
    python benchmarks/tiles.py memory --model CHECKPOINT [--sizes 20000]
    python benchmarks/tiles.py nuclei --data DATA [--model CHECKPOINT --tile 128]
    python benchmarks/tiles.py cut --data DATA --output FOLDER

`merging` asks what the merging does, so that no network takes part: every tile is told the truth of a generated scene,
disturbed as networks disturb it. Each mask is moved by up to two pixels, in every tile by others, and of the slices
that a tile's edge leaves of a thing, narrower than eight pixels, half are missed. Seconds are
CPU time of the merging, without that of the scene. Every size is a process of its own, whose largest memory counts
beyond what it had when the first tile was read.
`network` compares a checkpoint's panoptic quality on scenes of 1024 pixels, taken whole and in tiles.
`memory` segments scenes of any size from the windows of the file to COCO's json, with the network: seconds, and what
the process needed beyond what it had with the model when it had segmented one tile.
`nuclei` stitches the validation images of DATA (`nuclei_dsb2018`) to 4000 x 4000 pixels and compares the average
precision of the stitched image in tiles with that of the single images, all by the checkpoint, or without one by a
simple segmenter without a network: a local threshold, and the watershed of the distance to it. `cut` makes the data to
train such a checkpoint on: tiles of 128 pixels of DATA as images and instance maps.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine
from PIL import Image
from scipy import ndimage

from mask2former_hf.data.large_scenes import LargeScene
from mask2former_hf.data.rle import coco_code
from mask2former_hf.data.runs import runs_of_map
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.data.windows import ImageWindows
from mask2former_hf.evaluation.average_precision import AveragePrecision
from mask2former_hf.evaluation.evaluator import headline, run_evaluation
from mask2former_hf.inference.rules import Rules
from mask2former_hf.inference.tile_merging import VOID, Thing, TileResult, segment_tiles
from mask2former_hf.inference.tiles import OVERLAP, plan_tiles

SIZES = (512, 1024, 2048, 4096, 8192, 20_000)
TILE = 1024
SLICE = 8  # pixels; narrower slices of things are missed half of the time
PARTS = 0.1  # share of a thing from which on a segment counts as a part of it
STITCHED = 4000
CUT = 128  # pixels of a tile of nuclei to train on: at most 38 nuclei, fewer than 255


class Ids(ImageWindows):
    """A scene's ids as red, green and blue."""

    def __init__(self, scene: LargeScene):
        self.scene, self.size, self.seconds = scene, scene.size, 0.0

    def read(self, window, step=1):
        start = time.process_time()
        ids = self.scene.ids(window, step)
        pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        self.seconds += time.process_time() - start
        return pixels


def disturbed_truth(labels: dict[int, int], seed: int = 0):
    """What takes the place of a network: tiles of `Ids` → their results."""
    rng = np.random.default_rng(seed)

    def look(tile: np.ndarray) -> TileResult:
        ids = tile[..., 0] + (tile[..., 1].astype(np.int32) << 8) + (tile[..., 2].astype(np.int32) << 16)
        H, W = ids.shape
        things = []
        for number, runs in runs_of_map(ids).items():
            left, top, right, bottom = runs.box
            is_cut = left == 0 or top == 0 or right == W or bottom == H
            if labels[number] in STUFF_LABEL_IDS or (
                is_cut and min(right - left, bottom - top) < SLICE and rng.random() < 0.5
            ):
                continue
            moved = runs.moved(*(int(pixels) for pixels in rng.integers(-2, 3, 2)) if min(left, top) > 1 else (0, 0))
            things.append(Thing(labels[number], float(rng.uniform(0.8, 1)), moved.cut((0, 0, W, H))))
        scores = np.stack([np.full(ids.shape, 0.1), ids == 1, ids == 2]).astype(np.float32)
        return TileResult(things, [VOID, *STUFF_LABEL_IDS], scores, dict.fromkeys(STUFF_LABEL_IDS, 0.9))

    return lambda tiles: map(look, tiles)


def merge(size: int) -> dict:
    """One size: what came out as one, time and memory."""
    scene = LargeScene((size, size), (size // 100) ** 2, unit=160, apart=True)
    plan, find = plan_tiles(scene.size, TILE, OVERLAP), disturbed_truth(scene.labels())
    rules = Rules("panoptic", ID2LABEL, STUFF_LABEL_IDS, False, 0.5)
    if size <= TILE:  # one tile; two by two to have a seam at all
        plan = plan_tiles(scene.size, size * 5 // 8, OVERLAP)
    image, looking = Ids(scene), 0.0

    def find_timed(tiles):
        nonlocal looking
        start = time.process_time()
        found = list(find(tiles))
        looking += time.process_time() - start
        return found

    before, start = memory(), time.process_time()
    result = segment_tiles(image, plan, rules, find_timed)
    seconds = time.process_time() - start - looking - image.seconds
    row = {"size": size, "tiles": len(plan), "things": len(scene.things), "seconds": seconds}
    row["memory"] = memory() - before
    return row | came_out(scene, plan, result)


def came_out(scene: LargeScene, plan, result) -> dict:
    """How many things that several tiles own are one segment, and panoptic quality's parts for things."""
    parts, best, matched, found = {}, {}, 0, 0
    areas = [scene.runs(number).area for number in range(len(scene.things))]
    for segment, runs in zip(result.segments, result.runs, strict=True):
        if segment.label_id in STUFF_LABEL_IDS:
            continue
        found += 1
        ids = scene.ids(segment.box)[runs.crop(segment.box)]
        for number, count in zip(*np.unique(ids[ids > 2] - 3, return_counts=True), strict=True):
            if count > PARTS * areas[number]:
                parts[number] = parts.get(number, 0) + 1
            iou = count / (areas[number] + segment.area - count)
            if iou > 0.5 and scene.things[number].label == segment.label_id:
                matched, best[number] = matched + 1, iou
    crossing = [n for n in range(len(areas)) if len(set(plan.owners(scene.runs(n).box))) > 1]
    whole = [n for n in crossing if parts.get(n) == 1 and n in best]
    quality = sum(best.values()) / (matched + (found - matched) / 2 + (len(areas) - matched) / 2)
    return {"found": found, "crossing": len(crossing), "one": len(whole), "pq_things": quality}


def memory() -> float:
    """Largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def merging(arguments):
    print("| pixels | tiles | things | found | cross a seam | of these one | PQ of things | s | ms per Mpx | GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        command = [sys.executable, __file__, "one-size", "--sizes", str(size)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        share = 100 * row["one"] / max(1, row["crossing"])
        print(
            f"| {size}² | {row['tiles']} | {row['things']} | {row['found']} | {row['crossing']} | {share:.1f} % "
            f"| {100 * row['pq_things']:.1f} | {row['seconds']:.1f} | {row['seconds'] / size**2 * 1e9:.0f} "
            f"| {row['memory']:.2f} |",
            flush=True,
        )


def network(arguments):
    from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
    from mask2former_hf.evaluation.evaluator import SegmentationEvaluator, evaluation_loader

    model = Mask2FormerForUniversalSegmentation.from_pretrained(arguments.model).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(arguments.model)
    scenes = ScenesDataset(arguments.scenes, size=1024, seed=7)
    print("| | PQ | SQ | RQ | PQ things | PQ stuff |\n|---|---|---|---|---|---|")
    for tile in (None, 768, 512):
        evaluator = SegmentationEvaluator(model.config, processor, ["pq"], threshold=arguments.threshold)
        run_evaluation(model, evaluation_loader(scenes, 1), evaluator, tile=tile)
        figures = headline(evaluator.compute())
        values = " | ".join(f"{100 * figures[name]:.1f}" for name in ("pq", "sq", "rq", "pq_things", "pq_stuff"))
        print(f"| {'whole' if tile is None else f'tiles of {tile}'} | {values} |", flush=True)


def memory_of(arguments):
    """Peak memory and time of whole images, from windows to json, by a checkpoint of `mask2former-hf demo`."""
    from mask2former_hf import Segmenter

    print("| pixels | tiles | segments | things | GB beyond the model's | CPU s | CPU s per tile |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        segmenter = Segmenter(arguments.model, tile=TILE)
        scene = LargeScene((size, size), (size // 340) ** 2, unit=TILE, apart=True)
        segmenter(LargeScene((TILE, TILE), 9, unit=TILE, seed=1), threshold=arguments.threshold)
        before, start = memory(), time.process_time()
        result = segmenter(scene, threshold=arguments.threshold)
        with tempfile.TemporaryFile("w") as file:
            json.dump(result.to_coco(), file)
        seconds, tiles = time.process_time() - start, len(plan_tiles(scene.size, TILE, OVERLAP))
        counts = f"{tiles} | {len(result.segments)} | {len(scene.things)}"
        print(f"| {size}² | {counts} | {memory() - before:.2f} | {seconds:.0f} | {seconds / tiles:.2f} |", flush=True)


def cut(arguments):
    """Tiles of DATA with a nucleus, as images and instance maps of two splits."""
    for path in sorted(arguments.data.glob("images/*/*.png")):
        split, pixels = path.parent.name, np.asarray(Image.open(path).convert("RGB"))
        ids = np.asarray(Image.open(arguments.data / "instance_labels" / split / path.name)).astype(np.int32)
        for top in range(0, ids.shape[0] - CUT + 1, CUT):
            for left in range(0, ids.shape[1] - CUT + 1, CUT):
                window = np.s_[top : top + CUT, left : left + CUT]
                if not ids[window].any():
                    continue
                numbers = np.unique(np.append(ids[window], 0), return_inverse=True)[1][:-1]
                for folder, part in (("images", pixels[window]), ("instance_labels", numbers.reshape(CUT, CUT))):
                    place = arguments.output / folder / split / f"{path.stem}_{top}_{left}.png"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(part.astype(np.uint8)).save(place)


def nuclei_of(tile: np.ndarray) -> TileResult:
    """Nuclei by a local threshold and the watershed of the distance to it; score by contrast."""
    from skimage.feature import peak_local_max
    from skimage.filters import gaussian
    from skimage.segmentation import watershed

    things, grey = [], gaussian(tile.mean(2), 1, preserve_range=True)
    bright = grey > 1.05 * gaussian(grey, 20, preserve_range=True) + 3
    distance = gaussian(ndimage.distance_transform_edt(bright), 1)
    peaks = peak_local_max(distance, min_distance=5, labels=bright.astype(int))
    seeds = np.zeros(grey.shape, dtype=np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    ids = watershed(-distance, seeds, mask=bright)
    for runs in runs_of_map(ids).values():
        if runs.area >= 20:
            inside = grey[runs.box[1] : runs.box[3], runs.box[0] : runs.box[2]][runs.crop(runs.box)]
            things.append(Thing(0, float(min(1.0, inside.mean() / 255)), runs))
    return TileResult(things)


def stitch(folder: Path, side: int, seed: int = 0):
    """The validation images side by side, again and again, and turned, until the sheet is full; and their truth.

    Returns:
        (side, side, 3) uint8, the window of every image on it, and per image its (h, w) ids of nuclei.
    """
    rng = np.random.default_rng(seed)
    names = sorted(path.name for path in (folder / "images" / "val").glob("*.png"))
    sheet, windows, maps, left, top, row_height = np.zeros((side, side, 3), np.uint8), [], [], 0, 0, 0
    while True:
        name = names[int(rng.integers(len(names)))]
        pixels = np.asarray(Image.open(folder / "images" / "val" / name).convert("RGB"))
        ids = np.asarray(Image.open(folder / "instance_labels" / "val" / name)).astype(np.int32)
        turns = int(rng.integers(4))
        pixels, ids = np.rot90(pixels, turns), np.rot90(ids, turns)
        H, W = ids.shape
        if left + W > side:
            left, top, row_height = 0, top + row_height, 0
        if top + H > side:
            return sheet, windows, maps
        sheet[top : top + H, left : left + W] = pixels
        windows.append((left, top, left + W, top + H))
        maps.append(ids)
        left, row_height = left + W, max(row_height, H)


def nuclei(arguments):
    from mask2former_hf import Segmenter

    sheet, windows, maps = stitch(arguments.data, STITCHED)
    rules = Rules("instance", {0: "nucleus"}, (), False, 0.0)
    truth = [
        {"category_id": 0, "segmentation": coco_code(runs.moved(*window[:2]), sheet.shape[:2])}
        for window, ids in zip(windows, maps, strict=True)
        for runs in runs_of_map(ids).values()
    ]
    print(f"{len(windows)} images with {len(truth)} nuclei on {STITCHED}²\n")
    print("| | found | AP | AP50 | AP75 |\n|---|---|---|---|---|")

    def row(name, found):
        metric = AveragePrecision({0: {"name": "nucleus"}}, max_detections=(1, 10, 100_000))
        codes = [coco_code(runs, sheet.shape[:2]) for _, _, runs in found]
        labels, scores = np.zeros(len(found), int), np.array([thing.score for thing in found])
        metric.update(codes, scores, labels, truth, image_id=0)
        figures = metric.compute()
        print(
            f"| {name} | {len(found)} | "
            + " | ".join(f"{100 * figures[k]:.1f}" for k in ("AP", "AP50", "AP75"))
            + " |"
        )

    def things_of(result):
        return [Thing(0, s.score, runs) for s, runs in zip(result.segments, result.runs, strict=True)]

    def found_in(image, tile, overlap):
        """By the checkpoint, or by the simple segmenter; of an image that no tile divides as a whole."""
        if arguments.model is not None:
            how = {} if tile is None else {"tile": tile, "overlap": overlap}
            return things_of(Segmenter(arguments.model, **how)(image, batch_size=8, threshold=0.0))
        plan = plan_tiles(image.shape[:2], tile or max(image.shape), overlap)
        return things_of(segment_tiles(ImageWindows(image), plan, rules, lambda tiles: map(nuclei_of, tiles)))

    tile = arguments.tile
    for name, divided in (("every image alone", None), (f"every image in tiles of {tile}", tile)):
        single = []
        for left, top, right, bottom in windows if divided is None or arguments.model else ():
            found = found_in(sheet[top:bottom, left:right], divided, OVERLAP)
            single += [thing._replace(runs=thing.runs.moved(left, top)) for thing in found]
        if single:
            row(name, single)
    for divided, overlap in ((None, 0.0), (tile, 0.0), (tile, OVERLAP)):
        name = "the sheet as a whole" if divided is None else f"tiles of {tile}, overlap {overlap:g}"
        row(name, found_in(sheet, divided, overlap))


COMMANDS = {"merging": merging, "network": network, "memory": memory_of, "nuclei": nuclei, "cut": cut}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*COMMANDS, "one-size"])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tile", type=int, default=1000, help="of nuclei (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--threshold", type=float, default=0.5)
    arguments = parser.parse_args()
    if arguments.what == "one-size":
        print(json.dumps(merge(arguments.sizes[0])))
        return
    print(machine())
    COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    main()
