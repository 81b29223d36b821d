"""`TrainingSettings` for videos: data, model, recipe and figures of one run of `train_clips`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..data.clips import ClipDataset, ClipRecipe
from ..data.json_files import write_json
from ..data.moving_scenes import MovingScenes
from ..data.rle import coco_tools
from ..data.scenes import HELD_OUT_SEED
from ..data.videos import VideoReader, YoutubeVis
from ..evaluation.videos import evaluate_videos
from ..inference.loading import default_device
from ..inference.video_segmenter import VideoSegmenter
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from .backbones import new_model
from .clips import train_clips, video_model
from .label_surgery import model_for_classes
from .optimization import FROM_PRETRAINED, FROM_RANDOM, multi_step_schedule, polynomial_schedule
from .recipes import load_recipe
from .settings import VIDEO_KINDS, TrainingSettings, starts_pretrained

DEFAULT_SIDES, DEFAULT_BATCH = (360, 480), 4
USED = {  # settings that mean something for videos
    *("output", "model", "backbone", "random_weights", "recipe", "queries", "data", "classes"),
    *("train_images", "train_annotations", "val_images", "val_annotations", "short_sides", "test_size"),
    *("steps", "batch_size", "learning_rate", "backbone_multiplier", "clip", "seed", "num_workers", "cpu"),
}


@dataclass
class VideoRun:
    """A run that is ready: `train` does it.

    There are no checkpoints on the way and no resuming; what was learnt is saved at the end, also after Ctrl-C.
    """

    settings: TrainingSettings
    model: Mask2FormerForVideoSegmentation
    processor: Mask2FormerVideoProcessor
    clips: ClipDataset
    val: VideoReader | None
    steps: int
    options: dict  # of `train_clips`
    new_classes: list[str]

    @classmethod
    def of(cls, settings: TrainingSettings) -> "VideoRun":
        """From settings whose `data` is one of `VIDEO_KINDS`.

        Raises:
            ValueError: for settings that are missing, contradict each other, or are for images only.
            OSError: for files that are not there.
        """
        if settings.data not in VIDEO_KINDS:
            raise ValueError(f"data={settings.data}: must be one of {', '.join(VIDEO_KINDS)}")
        idle = [f.name for f in fields(settings) if f.name not in USED and getattr(settings, f.name) != f.default]
        if idle:
            raise ValueError(f"{idle[0]}={getattr(settings, idle[0])!r}: is for images; leave it out for videos")
        if settings.output is None:
            raise ValueError("output= is missing: the folder of the run")
        recipe = None if settings.recipe is None else load_recipe(settings.recipe)
        if recipe is not None and not recipe.video:
            raise ValueError(f"recipe={recipe.name}: is for images; those for videos begin with ytvis-")
        given = [name for name in ("model", "backbone") if getattr(settings, name) is not None]
        if len(given) > 1 or not (given or recipe):
            raise ValueError("give one of model= and backbone=, or a recipe= for its backbone")
        train, val = load_videos(settings, "train"), load_videos(settings, "val")
        if train is None:
            raise ValueError("data=youtube-vis needs train_images= and train_annotations=")
        if val is not None:
            coco_tools()  # now, and not after the training
            if val.classes.id2label != train.classes.id2label:
                raise ValueError(
                    f"val_annotations={settings.val_annotations}: its classes are not those of train_annotations="
                    f"{settings.train_annotations}; give both files the same categories"
                )
        steps = settings.steps or (recipe.iterations if recipe else None)
        if steps is None:
            raise ValueError("steps= is missing: optimizer steps, or a recipe= that says them")
        if settings.model is not None:
            model, new = model_for_classes(settings.model, train.classes, "instance", settings.queries)
        else:
            torch.manual_seed(settings.seed)
            more = {} if settings.queries is None else {"num_queries": settings.queries}
            model = new_model(settings.backbone or recipe, train.classes, "instance", settings.random_weights, **more)
            new = []
        rates = FROM_PRETRAINED if starts_pretrained(settings) else FROM_RANDOM
        options = {name: value for name, value in rates.items()}
        options |= {name: v for name in options if (v := getattr(settings, name)) is not None}
        options |= {"batch_size": settings.batch_size or (recipe.batch_size if recipe else DEFAULT_BATCH)}
        if recipe is not None:
            milestones = [round(m * steps / recipe.iterations) for m in recipe.milestones]
            options["schedule"] = lambda optimizer, steps: multi_step_schedule(optimizer, milestones)
        clips = {"short_sides": tuple(settings.short_sides or DEFAULT_SIDES)}
        if recipe is not None:
            clips = dict(recipe.augmentation) | ({"short_sides": settings.short_sides} if settings.short_sides else {})
        shortest, longest = settings.test_size or (min(clips["short_sides"]), 1333)
        size = {"shortest_edge": shortest, "longest_edge": longest}
        size = recipe.test_size if recipe is not None and not settings.test_size else size
        return cls(
            settings,
            video_model(model).to("cpu" if settings.cpu else default_device()),
            Mask2FormerVideoProcessor(size=size),
            ClipDataset(train, ClipRecipe(**clips), settings.seed),
            val,
            steps,
            options | {"seed": settings.seed, "num_workers": settings.num_workers},
            new,
        )

    def train(self, progress: Callable = iter, on_step: Callable | None = None) -> dict:
        """Train, save model and processor, and measure on the videos to measure on; also into `results.json`.

        Returns:
            `steps`, those that were done, and the figures of `evaluate_videos`.
        """
        output = Path(self.settings.output)
        output.mkdir(parents=True, exist_ok=True)  # now, and not after the training
        torch.manual_seed(self.settings.seed)
        options = {"schedule": polynomial_schedule} | self.options
        done = train_clips(self.model, self.clips, self.processor, steps=self.steps, on_step=on_step, **options)
        self.model.save_pretrained(output)
        self.processor.save_pretrained(output)
        figures = {"steps": done}
        if self.val is not None:
            segmenter = VideoSegmenter.of(self.model, self.processor)
            figures |= evaluate_videos(segmenter, self.val, progress=progress)
        write_json(output / "results.json", figures)
        return figures


def load_videos(settings, split: str) -> VideoReader | None:
    """The videos of a split that settings describe; None if they name no files."""
    if settings.data == "moving-scenes":
        return MovingScenes(2000) if split == "train" else MovingScenes(40, seed=HELD_OUT_SEED)
    images, annotations = (getattr(settings, f"{split}_{name}") for name in ("images", "annotations"))
    if images is None and annotations is None:
        return None
    if images is None or annotations is None:
        raise ValueError(f"data=youtube-vis needs both {split}_images= and {split}_annotations=")
    return YoutubeVis(images, annotations, settings.classes)
