"""Checkpoints that bring this implementation along, for `trust_remote_code=True` where the package is missing."""

import copy
import json
import shutil
from pathlib import Path

from ..inference.known_labels import stuff_of
from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor

MODEL_FILES = Path(__file__).resolve().parents[1] / "model"  # transformers fetches no folders: all beside each other
CONFIG_MODULE = "configuration_with_code"
MODEL_MAP = {
    "AutoConfig": f"{CONFIG_MODULE}.{Mask2FormerConfig.__name__}",
    "AutoModel": "modeling_mask2former.Mask2FormerModel",
    "AutoModelForUniversalSegmentation": "modeling_mask2former.Mask2FormerForUniversalSegmentation",
}
# By backend: a plain string makes pipeline() ask users who never mentioned remote code (y/N, for 15 seconds).
PROCESSOR_MAP = {
    "AutoImageProcessor": dict.fromkeys(
        ("torchvision", "pil"), "image_processing_mask2former.Mask2FormerImageProcessor"
    )
}

VIDEO_MODEL_MAP = MODEL_MAP | {
    "AutoModel": "modeling_mask2former_video.Mask2FormerVideoModel",
    "AutoModelForUniversalSegmentation": "modeling_mask2former_video.Mask2FormerForVideoSegmentation",
}
VIDEO_PROCESSOR_MAP = PROCESSOR_MAP | {"AutoVideoProcessor": "video_processing_mask2former.Mask2FormerVideoProcessor"}
KINDS = {  # model -> its processor, and who loads the two
    Mask2FormerForUniversalSegmentation: (Mask2FormerImageProcessor, MODEL_MAP, PROCESSOR_MAP),
    Mask2FormerForVideoSegmentation: (Mask2FormerVideoProcessor, VIDEO_MODEL_MAP, VIDEO_PROCESSOR_MAP),
}

_CONFIG_SOURCE = '''"""The config of a checkpoint that was saved with its code (mask2former_hf, `save_with_code`)."""

from .configuration_mask2former import Mask2FormerConfig as _Mask2FormerConfig

_UNIVERSAL, _FOR_PIPELINE = "AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation"


class Mask2FormerConfig(_Mask2FormerConfig):
    """Adds, once its code is trusted, the class that `pipeline` asks for: of images, also for a model of videos.

    In config.json that entry would make `pipeline` ask every user whether to run the code, because transformers has no
    Mask2Former of its own under that name.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        auto_map = getattr(self, "auto_map", None) or {}
        if _UNIVERSAL in auto_map:
            of_images = auto_map[_UNIVERSAL].replace("_video.Mask2FormerForVideo", ".Mask2FormerForUniversal")
            self.auto_map = {**auto_map, _FOR_PIPELINE: of_images}

    def to_dict(self):
        fields = super().to_dict()
        if fields.get("auto_map"):
            fields["auto_map"] = {name: value for name, value in fields["auto_map"].items() if name != _FOR_PIPELINE}
        return fields
'''


def save_with_code(
    model: Mask2FormerForUniversalSegmentation | Mask2FormerForVideoSegmentation,
    processor: Mask2FormerImageProcessor | Mask2FormerVideoProcessor,
    directory: str | Path,
):
    """Write a checkpoint together with the Python files that run it.

    With `trust_remote_code=True` the Auto classes and `pipeline` then run this implementation in a process that lacks
    this package. Without it everybody gets transformers' own classes, and nobody is asked. The files are Apache-2.0.

    The processor's file names the checkpoint's stuff (`label_ids_to_fuse`), because transformers' pipeline, which runs
    where this package is missing, does not read the config's. That pipeline takes `subtask=None` for panoptic whatever
    the checkpoint is for, so give it a `subtask`.

    A model of videos is loaded by `AutoModelForUniversalSegmentation` and `AutoVideoProcessor`, as transformers' own
    are; whoever asks for images gets a model of single frames.

    Args:
        model, processor: of images, or of videos.
        directory: created if it does not exist; a checkpoint there is overwritten.

    Raises:
        ValueError: if `directory` is a file, or the model or processor is not of this package.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"directory={str(directory)!r} is a file: give a folder, which need not exist")
    model_class = type(model) if type(model) in KINDS else Mask2FormerForUniversalSegmentation
    processor_class, model_map, processor_map = KINDS[model_class]
    for name, given, wanted in (("model", model, model_class), ("processor", processor, processor_class)):
        if type(given) is not wanted:
            raise ValueError(
                f"{name} is a {type(given).__module__}.{type(given).__name__}: only the code of this package's "
                f"{wanted.__name__} travels; load the checkpoint with that class"
            )
    if processor.label_ids_to_fuse is None:
        processor = copy.copy(processor)
        processor.label_ids_to_fuse = stuff_of(model.config)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    for path in MODEL_FILES.glob("[!_]*.py"):
        shutil.copyfile(path, directory / path.name)
    (directory / f"{CONFIG_MODULE}.py").write_text(_CONFIG_SOURCE, encoding="utf-8")
    # Written here and not by register_for_auto_class, which would change the classes for the rest of the process.
    _add(directory / "config.json", model_map)
    _add(directory / "preprocessor_config.json", processor_map)


def _add(path: Path, auto_map: dict):
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["auto_map"] = auto_map
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
