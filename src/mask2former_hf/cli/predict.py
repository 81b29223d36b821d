"""`mask2former-hf predict`: images in, overlays and results in COCO's formats or those of other tools out.

Videos are predict_video.py's.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..data.formats.writers import TOOL_WRITERS
from ..data.image_lists import HubImages, ImageFiles, ImageList, find_images
from ..data.pictures import shown_bands
from ..inference.exported import is_exported
from ..inference.known_labels import stuff_of
from ..inference.many_images import ManyImages
from ..inference.result_files import COCO, OutputSettings
from ..inference.rules import METHODS, Rules
from ..inference.run_folder import OtherRun, RunFolder, number_of_shards, share_of, write_record
from ..inference.segmenter import Segmenter
from ..inference.video_files import is_video
from ..inference.workers import WorkerDied
from ..model.result_defaults import TASKS
from .device import add_device_argument
from .main import UserError, in_flags
from .output_folder import OF_IMAGES, check_output, record_of, remove, report
from .precision import add_dtype_argument
from .signals import Ended
from .tiling import add_effort_argument, add_tile_arguments, check_level, overlap_of

FEW = 20  # images for which no process is begun: it takes a second
WORKERS, MOST_WORKERS = 2, 2**10  # more is a slip of the keyboard


def add_arguments(parser: argparse.ArgumentParser):
    _add_image_arguments(parser)
    parser.add_argument("--model", required=True, help="checkpoint folder, Hub id, or folder of an export")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results in --output (default: go on with that run)"
    )
    parser.add_argument("--num-shards", type=int, help="parts of the results (default: one for each 500 images)")
    parser.add_argument(
        "--shard", type=int, nargs="+", metavar="NUMBER", help="do these alone, from 0 (default: all that are missing)"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=(COCO, *TOOL_WRITERS),
        default=[COCO],
        help="formats of the results (default: coco), each in a folder of its name; docs/formats.md describes them",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="simplify polygons by less than so many pixels (default: 0, exact; 0.5 has a third of the points)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="draw nothing, for many images")
    parser.add_argument("--task", help=f"{', '.join(TASKS)} (default: what the checkpoint is for)")
    parser.add_argument("--threshold", type=float, help="lowest score (default: panoptic mostly 0.8, instance 0.5)")
    parser.add_argument(
        "--stuff", type=int, nargs="*", metavar="LABEL", help="labels that are stuff (default: by checkpoint)"
    )
    parser.add_argument(
        "--refine", choices=METHODS, help="a threshold per mask (otsu), or a dense CRF over the image (crf)"
    )
    add_tile_arguments(parser)
    parser.add_argument(
        "--level",
        type=int,
        default=0,
        help="with --tile: level of a TIFF's pyramid to segment, 1 for its first overview; results have its size "
        "(default: 0, the image itself)",
    )
    add_effort_argument(parser)
    parser.add_argument(
        "--show-bands",
        nargs="+",
        type=int,
        metavar="BAND",
        help="of images of bands: three for red, green and blue of the overlays, or one (default: the first)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images, or tiles, per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers", type=int, help=f"processes that read and write (default: {WORKERS}, 0 below {FEW} images)"
    )
    parser.add_argument("--tta", action="store_true", help="average over six sizes and their mirror images")
    add_dtype_argument(parser)
    add_device_argument(parser, "cuda if it is there, else cpu; for an export cpu")


def _add_image_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of images, 'patterns/**/*.jpg', or lists.txt of paths; or one of: a COCO json, a "
        "data set saved by datasets, hf://datasets/USER/NAME, a video file, webcam:0",
    )
    parser.add_argument("--root", metavar="DIR", help="folder where a list's or json's paths begin (default: its own)")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--column", help="of a data set's images (default: the only one)")
    parser.add_argument("--video", action="store_true", help="the folder is one video, its images are the frames")


def run(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    if arguments.video or any(is_video(path) for path in arguments.images):
        if len(arguments.images) > 1:
            raise UserError(f"{len(arguments.images)} inputs, of which one is a video: give one video at a time")
        from ..inference.video_prediction import OVERLAY, RESULTS
        from . import predict_video

        present = check_output(arguments, arguments.images, RESULTS, OVERLAY)
        return predict_video.run(arguments, partial(remove, present))
    process, processes = _processes(arguments)
    images, problems = _find(arguments)
    if arguments.tile is not None:
        check_level(arguments.level, images)
    folder, shards = _shards(arguments, len(images), process, processes)
    inputs = images.paths if isinstance(images, ImageFiles) and arguments.overwrite else ()
    present = check_output(arguments, [*arguments.images, *inputs], OF_IMAGES, goes_on=True)
    segmenter, rules = _segmenter(arguments)
    settings = _settings(arguments, rules, segmenter.channels)
    record = record_of(arguments, segmenter, rules, images, folder.num_shards)
    try:
        settings.check_packages()
        remove(present)
        write_record(arguments.output, record)
    except OtherRun as error:
        raise UserError(
            f"--output {arguments.output}: has results of another run ({error}); name another folder, or add "
            "--overwrite to replace them"
        ) from error
    except OSError as error:
        place = error.filename or arguments.output
        raise UserError(f"--output {arguments.output}: {place} cannot be written ({error.strerror})") from error
    except ImportError as error:
        raise UserError(f"--format {' '.join(settings.formats)}: {error}") from error
    for problem in problems if process == 0 else ():
        _say(problem)
    _predict(arguments, segmenter, rules, images, folder, settings, shards, process, processes)
    return report(arguments, folder, problems, segmenter, rules, images)


def _predict(arguments, segmenter, rules, images, folder, settings, shards, process, processes):
    count = arguments.num_workers
    if count is None:
        count = 0 if len(images) < FEW else WORKERS
    whole = sum(len(folder.positions(shard)) for shard in shards)
    done = sum(len(folder.positions(shard)) for shard in shards if folder.is_done(shard))
    description = "predicting" if processes == 1 else f"predicting ({process + 1} of {processes} processes)"
    with tqdm(total=whole, initial=done, desc=description, unit="image", disable=process > 0) as bar:
        run = ManyImages(
            segmenter,
            rules,
            images,
            folder,
            settings,
            arguments.batch_size,
            count,
            bar.update,
            _say,
        )
        try:
            run.run(shards)
        except WorkerDied as error:
            raise UserError(
                f"{error}, mostly for lack of memory; the same command goes on, with fewer --num-workers or none"
            ) from error
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"--output {arguments.output}: {error.filename} is in the way ({error.strerror}); remove it, or name "
                "another folder"
            ) from error
        except (KeyboardInterrupt, Ended):
            bar.close()
            complete = folder.num_shards - len(folder.missing())
            _say(f"{complete} of {folder.num_shards} shards are complete; the same command does the others")
            raise


def _say(line: str):
    tqdm.write(f"mask2former-hf predict: {line}", file=sys.stderr)  # above the bar


def _check_numbers(arguments):
    if arguments.task not in (None, *TASKS):
        raise UserError(f"--task {arguments.task}: must be one of {', '.join(TASKS)}")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold}: must be between 0 and 1")
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance}: must be 0 (exact) or more pixels")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    overlap_of(arguments.tile, arguments.overlap)
    if arguments.num_shards is not None and arguments.num_shards < 1:
        raise UserError(f"--num-shards {arguments.num_shards}: must be at least 1")
    if arguments.num_workers is not None and not 0 <= arguments.num_workers <= MOST_WORKERS:
        raise UserError(f"--num-workers {arguments.num_workers}: must be 0 (none) to {MOST_WORKERS}")


def _processes(arguments) -> tuple[int, int]:
    """Which of how many processes of `torchrun` or `accelerate launch` this is."""
    try:
        process, processes = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        process, processes = -1, 0
    if not 0 <= process < processes:
        shown = f"RANK={os.environ.get('RANK')}, WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
        raise UserError(f"{shown}: must be 0 <= RANK < WORLD_SIZE, as launchers set them; correct or unset them")
    if processes > 1 and arguments.shard is not None:
        raise UserError("--shard: a launcher's processes share all shards among themselves; leave one of the two out")
    if arguments.overwrite and (processes > 1 or arguments.shard is not None):
        raise UserError(
            f"--overwrite: one of several processes would remove what the others have done; remove {arguments.output} "
            "before they begin"
        )
    return process, processes


def _find(arguments) -> tuple[ImageList, list[str]]:
    try:
        images, problems = find_images(arguments.images, arguments.root, arguments.split, arguments.column)
    except (ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), ("root", "split", "column"))) from error
    if not len(images):
        raise UserError("; ".join(problems))
    if isinstance(images, HubImages) and "labelme" in arguments.format:
        raise UserError("--format labelme: names the file of each image, which data sets have not; choose another")
    return images, problems


def _shards(arguments, images: int, process: int, processes: int) -> tuple[RunFolder, list[int]]:
    """The folder of the run, and which shards are for this process."""
    count = number_of_shards(images) if arguments.num_shards is None else arguments.num_shards
    if count > images:
        raise UserError(f"--num-shards {count}: a shard has one image at least; give at most {images}")
    if wrong := [shard for shard in arguments.shard or () if not 0 <= shard < count]:
        raise UserError(f"--shard {wrong[0]}: the shards are 0 to {count - 1} (--num-shards {count})")
    chosen = share_of(process, processes, count) if arguments.shard is None else dict.fromkeys(arguments.shard)
    return RunFolder(arguments.output, images, count), list(chosen)


def _settings(arguments, rules: Rules, channels: int | None) -> OutputSettings:
    return OutputSettings(
        rules.task,
        rules.id2label,
        rules.stuff_label_ids,
        tuple(dict.fromkeys(arguments.format)),
        not arguments.no_overlays,
        arguments.tolerance,
        Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        _bands_to_show(arguments.show_bands, channels),
    )


def _device(name: str | None) -> str | None:
    """The device by its name; each process of a launcher has a GPU of its own."""
    from ..inference.loading import default_device

    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several and (name or default_device()) == "cuda" else name


def _segmenter(arguments) -> tuple[Segmenter, Rules]:
    options = {name: getattr(arguments, name) for name in ("task", "refine", "tta", "tile")}
    options |= {"effort": 1 if arguments.effort is None else arguments.effort, "level": arguments.level}
    try:
        options["overlap"] = overlap_of(arguments.tile, arguments.overlap)
        if is_exported(arguments.model):
            segmenter = Segmenter(arguments.model, device=arguments.device, dtype=arguments.dtype, **options)
            segmenter.model.check_batch(arguments.batch_size)
        else:
            try:
                from .loading import load  # imports torch, which an export does without
            except ModuleNotFoundError as error:
                raise UserError(
                    f"--model {arguments.model}: is no export, and checkpoints need torch ({error})"
                ) from error

            model, processor = load(arguments.model, _device(arguments.device), dtype=arguments.dtype)
            segmenter = Segmenter.of(model, processor, **options, replay=True)
    except (ImportError, ValueError) as error:
        text = (
            f"--refine {arguments.refine}: {error}"
            if arguments.refine
            else in_flags(str(error), ["batch_size", "dtype", "effort", "level"])
        )
        raise UserError(text) from error
    config, processor = segmenter.model.config, segmenter.processor
    unknown = [label for label in arguments.stuff or () if not 0 <= label < config.num_labels]
    if unknown:
        raise UserError(f"--stuff {unknown}: the checkpoint has labels 0 to {config.num_labels - 1}")
    try:
        rules = segmenter.rules(threshold=arguments.threshold, stuff_label_ids=arguments.stuff)
    except ValueError as error:
        raise UserError(in_flags(str(error), ["threshold"])) from error
    if rules.task == "panoptic" and arguments.stuff is None and stuff_of(config, processor) is None:
        print(
            "The checkpoint does not say which labels are stuff; none is fused (--stuff names them)", file=sys.stderr
        )
    return segmenter, rules


def _bands_to_show(given: list[int] | None, channels: int | None) -> tuple[int, ...] | None:
    """What --show-bands says, or the first bands; None for photos.

    Raises:
        UserError: for bands that the images do not have, and for photos.
    """
    if given is not None and channels is None:
        raise UserError(f"--show-bands {' '.join(map(str, given))}: the checkpoint is for photos; leave it out")
    try:
        return None if channels is None else tuple(shown_bands(channels, given))
    except ValueError as error:
        raise UserError(in_flags(str(error), ["show_bands"])) from error
