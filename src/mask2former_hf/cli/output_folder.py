"""What `predict` finds in its output folder, and what it says at the end about what it has put there."""

import dataclasses
import json
import shutil
from pathlib import Path

from .. import __version__
from ..data.image_lists import ImageList
from ..inference.digest import digest
from ..inference.result_files import RESULTS
from ..inference.rules import Rules
from ..inference.run_folder import RECORD, SHARDS, STAGING_OF_ONE, SUMMARY, UNREADABLE, RunFolder
from ..inference.segmenter import Segmenter
from .main import UserError

# The record is the last to be removed: without it the others are nobody's.
OF_IMAGES = (*RESULTS, SHARDS, STAGING_OF_ONE, SUMMARY, UNREADABLE, RECORD)
ASKED_AGAIN = 10  # images of which the best score is looked for if no segment was above the threshold


def check_output(
    arguments, inputs: list, results: tuple[str, ...], always: str = RECORD, goes_on: bool = False
) -> list[Path]:
    """The results of an earlier run, which are to be removed before the first new one is written.

    Args:
        inputs: what is to be read.
        results: names of what a run may write.
        always: what every run writes: without it the others are not a run's.
        goes_on: whether a run may go on where one was stopped.

    Raises:
        UserError: unless they may be overwritten, are those of a run, and none of them is an input.
    """
    output = arguments.output
    present = [name for name in results if (output / name).exists()]
    if present and not arguments.overwrite:
        if goes_on and always in present:
            return []
        raise UserError(
            f"--output {output}: has results of another run ({', '.join(present)}); name another folder, or add "
            "--overwrite to replace them"
        )
    paths = [output / name for name in present]
    removed = {path.resolve() for path in paths}
    for path in map(Path, inputs if removed else ()):
        if removed & {path.resolve(), *path.resolve().parents}:
            raise UserError(f"--output {output}: --overwrite would remove {path}, which is to be read; name another")
    if present and always not in present:
        raise UserError(
            f"--output {output}: {', '.join(present)} there are not of an earlier run, which would have left "
            f"{always}; name another folder"
        )
    return paths


def remove(paths: list[Path]):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def record_of(arguments, segmenter: Segmenter, rules: Rules, images: ImageList, num_shards: int) -> dict:
    """What results depend on, as far as they are to be equal after a run was stopped and went on."""
    record = {
        "mask2former_hf": __version__,
        "model": arguments.model,
        "images": len(images),
        "images_sha256": images.digest(),
        "num_shards": num_shards,
        **{name: value for name, value in dataclasses.asdict(rules).items() if name != "id2label"},
        **{name: getattr(segmenter, name) for name in ("tta", "tile", "overlap", "effort")},
        "level": segmenter.opening.level,
        **{name: getattr(arguments, name) for name in ("dtype", "format", "tolerance", "no_overlays", "show_bands")},
        "weights_sha256": digest(segmenter.model, segmenter.processor),  # last: effort and dtype change it, too
    }
    return json.loads(json.dumps(record))  # as it is read again


def report(
    arguments, folder: RunFolder, problems: list[str], segmenter: Segmenter, rules: Rules, images: ImageList
) -> int:
    """Says how far the run has come; the process that ends it says how it went, in words and in its exit code.

    The others exit with 0: a launcher would end all processes at the first one that does not.

    Returns:
        The exit code.
    """
    if missing := folder.missing():
        complete = folder.num_shards - len(missing)
        print(f"{complete} of {folder.num_shards} shards are complete: {arguments.output}")
        return 0
    summaries = [folder.summary(shard) for shard in range(folder.num_shards)]
    count, segments = (sum(summary[name] for summary in summaries) for name in ("images", "segments"))
    unreadable = [entry["image"] for summary in summaries for entry in summary["unreadable"]]
    total = len(images) + len(problems)
    print(f"{count} of {total} images, {segments} segments: {arguments.output}")
    if count and not segments:
        _say_best_score(arguments, segmenter, rules, images)
    if unreadable:
        path = arguments.output / UNREADABLE
        lines = "".join(f"{name}\n" for name in unreadable)
        path.write_text(lines, encoding="utf-8", errors="surrogateescape")  # names of files may be any bytes
        print(f"not readable: {len(unreadable)}, listed in {path}")
    return 2 if problems or unreadable else 0


def _say_best_score(arguments, segmenter: Segmenter, rules: Rules, images: ImageList):
    best = 0.0
    for index in range(min(ASKED_AGAIN, len(images))):
        try:
            image = segmenter.open(images[index].source)
        except (OSError, ValueError):
            continue
        result = segmenter(image, threshold=0.0, overlap_threshold=0.0, stuff_label_ids=arguments.stuff)
        best = max([best, *(segment.score for segment in result.segments)])
    if best < rules.threshold:
        print(f"0 segments are above the threshold of {rules.threshold:g}; best score {best:.2f}; try --threshold")
    else:
        print(f"0 segments: the best score is {best:.2f}, but too little of each mask is left beside better ones")
