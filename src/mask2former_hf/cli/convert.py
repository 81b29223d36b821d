"""`mask2former-hf convert`: checkpoints of others to a folder, and back to the original's."""

import argparse
import errno
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..conversion.architecture import Settings
from ..conversion.checkpoint_files import Checkpoint, read_checkpoint, write_original
from ..conversion.converting import assumptions, build_model, check_numbers, recognise_source, to_original
from ..conversion.detectron2_config import settings_from_yaml
from ..conversion.maskformer import is_maskformer, read_maskformer
from ..conversion.names import CheckpointError
from ..data.classes import ClassTable
from ..hub.model_card import write_model_card
from ..hub.publishing import push_to_hub
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from ..training.recipes import load_recipe, recipe_names
from .loading import load_model
from .main import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "source",
        help="checkpoint file (.pkl, .pth); folder or Hub id of a MaskFormer; with --to original of ours",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; with --to original a file, .pth or .pkl")
    parser.add_argument("--to", choices=("transformers", "original"), default="transformers")
    parser.add_argument(
        "--vit", metavar="PLACE", help="of DINOv3's head: the ViT's folder, Hub id (transformers) or file (Meta)"
    )
    parser.add_argument("--recipe", help="the original's recipe it was trained with, such as coco-panoptic-swin-t")
    parser.add_argument("--config", type=Path, help="the original's yaml it was trained with")
    parser.add_argument("--push", metavar="ID", help="publish the result on the Hub, with a model card, as ID")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")


def run(arguments: argparse.Namespace) -> int:
    if arguments.recipe and arguments.config:
        raise UserError("--recipe and --config say the same thing: give one of them")
    if arguments.to == "original" and (arguments.recipe or arguments.config or arguments.vit):
        raise UserError("--recipe, --config and --vit are for checkpoints of others; a folder has its own config.json")
    if arguments.to == "original" and arguments.push:
        raise UserError("--push publishes folders of transformers; leave it out with --to original")
    transformers_logging.disable_progress_bar()
    try:
        check_output(arguments.output, arguments.overwrite)
        if arguments.to == "original":
            return write_back(arguments.source, arguments.output)
        settings = read_settings(arguments.recipe, arguments.config)
        checkpoint = read_source(arguments.source)
        model, processor = convert(checkpoint, settings, arguments.output, arguments.vit)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        name = error.filename or (arguments.output if error.errno in FULL else arguments.source)
        raise UserError(f"{name}: {error.strerror or error}") from error
    except SafetensorError as error:  # of writing: reading has its own message
        raise UserError(f"{arguments.output}: {error}") from error
    if arguments.push:
        publish(model, processor, arguments)
    subject = "VIDEO" if isinstance(model, Mask2FormerForVideoSegmentation) else "IMAGE"
    print(f"Next: mask2former-hf predict {subject} --model {arguments.output} --output predictions")
    return 0


def read_source(source: str) -> Checkpoint:
    """A file; or the folder or Hub id of transformers' MaskFormer."""
    path = Path(source)
    if not path.is_file() and (path.is_dir() or source.count("/") == 1) and is_maskformer(source):
        return read_maskformer(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint file (for the way back add --to original)")
    return read_checkpoint(path)


def check_output(output: Path, overwrite: bool):
    here = Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise UserError(f"--output {output}: would replace the folder that you are in; name a folder of its own")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists already; name another place, or add --overwrite to replace it")


def read_settings(recipe: str | None, config: Path | None) -> Settings | None:
    if config is not None:
        return settings_from_yaml(config)
    return None if recipe is None else settings_from_recipe(recipe)


def settings_from_recipe(name: str) -> Settings:
    try:
        recipe = load_recipe(name)
    except ValueError as error:
        raise UserError(f"--recipe {error}") from error
    processor = {"size": recipe.test_size}
    return Settings(
        name, recipe.config_fields(), recipe.backbone_fields(), processor, recipe.class_set, video=recipe.video
    )


def convert(checkpoint: Checkpoint, settings: Settings | None, output: Path, vit: str | None = None):
    """Write config.json, model.safetensors and preprocessor_config.json, all or nothing; returns model, processor."""
    source = recognise_source(checkpoint, vit)
    notes = [*source.notes, *(settings.notes if settings else [])]
    if assumed := assumptions(source, settings):
        notes.append(assumed)
    num_labels = source.architecture.config["num_labels"]
    labels, stuff, origin = class_names(checkpoint, settings, num_labels)
    model = build_model(source, settings, labels, stuff)
    print(f"{len(checkpoint.tensors)} tensors of {source.kind}: all accounted for")
    if settings is None:
        notes.append(f"test size, task and class names are not in a checkpoint. {suggest(source.architecture)}")
    if labels is None:
        notes.append(f"the {num_labels} classes are named LABEL_0, LABEL_1, ...")
    else:
        print(f"Class names from {origin}")
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    print(check_numbers(model))
    of_clips = isinstance(model, Mask2FormerForVideoSegmentation)
    processor = (Mask2FormerVideoProcessor if of_clips else Mask2FormerImageProcessor)(
        ignore_index=model.config.ignore_value,
        num_labels=num_labels,
        label_ids_to_fuse=stuff,
        **(source.processor | (settings.processor if settings else {})),
    )
    save_folder(output, model, processor)
    print(f"Saved {output}")
    return model, processor


def publish(model, processor, arguments):
    try:
        address = push_to_hub(model, processor, arguments.push, private=arguments.private or None)
    except (PermissionError, ConnectionError, ValueError) as error:
        raise UserError(f"--push: {error}. The converted checkpoint is in {arguments.output}") from error
    print(f"Published {address}")


def class_names(checkpoint: Checkpoint, settings: Settings | None, num_labels: int):
    """Names by label, labels that are stuff, and where this is known from; `None`s if it is not."""
    if settings is not None and settings.class_set is not None:
        try:
            table = ClassTable.load(settings.class_set)
        except (OSError, ValueError) as error:
            print(f"Note: class names of {settings.class_set} are not there ({error})", file=sys.stderr)
        else:
            if len(table) == num_labels:
                return table.id2label, table.stuff_label_ids, f"the class set {settings.class_set}"
            print(
                f"Note: {settings.class_set} has {len(table)} classes, the checkpoint {num_labels}; no names are set",
                file=sys.stderr,
            )
    meta = checkpoint.rest.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}  # mmdetection 3
    names = dataset.get("classes") or dataset.get("CLASSES") or meta.get("CLASSES")
    if isinstance(names, list | tuple) and len(names) == num_labels == len(set(map(str, names))):
        kinds = dataset.get("stuff_classes") or dataset.get("STUFF_CLASSES")
        stuff = None if kinds is None else [label for label, name in enumerate(names) if name in kinds]
        return {label: str(name) for label, name in enumerate(names)}, stuff, "the checkpoint's own metadata"
    return None, None, None


def suggest(architecture) -> str:
    """Which recipes have this backbone, number of classes and number of queries."""
    seen = architecture.backbone | architecture.config
    fitting = []
    for name in recipe_names():
        recipe = load_recipe(name)
        fields = recipe.backbone_fields() | recipe.config_fields()
        if all(seen[key] == value for key, value in fields.items() if key in seen):
            fitting.append(name)
    return f"--recipe says them; {', '.join(fitting)} would fit" if fitting else "None of the recipes fits"


def save_folder(output: Path, model, processor):
    """Save beside the place and rename, so that no error leaves half a checkpoint."""
    staging, old = output.with_name(f".{output.name}.part"), output.with_name(f".{output.name}.old")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        if model.config.weights_license:
            write_model_card(model, staging, processor, repo_id=output.name)
        if output.exists():
            output.rename(old)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def write_back(source: str, output: Path) -> int:
    state = to_original(load_model(source, "SOURCE"))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_original(output, state)
    print(f"Saved {output}: {len(state)} tensors under the names of facebookresearch/Mask2Former")
    return 0
