"""A training run of clips: what differs from images is the data, the model and the trainer."""

from dataclasses import fields

import torch

from ..data.clips import ClipDataset, ClipRecipe
from ..data.kinds import VIDEO_KINDS
from ..inference.loading import default_device
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from .annealing import check_design
from .backbones import normalisation_of, queries_for
from .checkpoints import last_complete_checkpoint
from .clips import ClipTrainer, video_model
from .freezing import freeze_backbone
from .memory import check_memory
from .recipes import Recipe
from .run import TrainingRun, fit_queries, save_activations, starting_model
from .run_arguments import training_arguments
from .run_data import check_split_headers
from .settings import TrainingSettings

DEFAULT_SIDES, LONGEST = (360, 480), 1333
USED = {  # settings that mean something for videos
    *("output", "resume", "model", "backbone", "vit_neck", "random_weights", "recipe", "queries"),
    *("pixel_decoder_type", "mask_loss", "mask_weight", "freeze_backbone", "freeze_batch_norm"),
    *("data", "classes", "held_out", "no_check", "short_sides", "test_size", "steps", "epochs"),
    *("batch_size", "accumulate", "learning_rate", "backbone_multiplier", "layer_decay", "warmup", "weight_decay"),
    *("clip", "seed", "anneal_masks", "eval_every", "keep", "log_every", "report_to", "num_workers", "bf16", "fp16"),
    *("gradient_checkpointing", "cpu"),
    *(f"{split}_{name}" for split in ("train", "val") for name in ("images", "annotations", "maps", "limit")),
}


class VideoRun(TrainingRun):
    """`TrainingRun` of a model of clips: the same folder, checkpoints, resuming, signals, logs and card.

    `VideoRun(TrainingSettings(output="run", backbone="tiny", data="moving-scenes", steps=300)).train()`

    Args:
        settings: with `data` of `data.kinds.VIDEO_KINDS`; those that are for images alone stay as they are by default.
        train_data, val_data: readers (`data.videos.VideoReader`), instead of those that the settings describe.
        show: bars while the frames' headers are read.

    Attributes:
        those of `TrainingRun` but `statistics`; `augmented` is a `ClipDataset`, and `most` the largest number of
        objects in a video.

    Raises:
        as `TrainingRun`.
    """

    kinds = VIDEO_KINDS
    channels = None  # models of clips take photos

    def __init__(self, settings: TrainingSettings, train_data=None, val_data=None, show: bool = True):
        if settings.data not in VIDEO_KINDS:
            raise ValueError(f"data={settings.data}: must be one of {', '.join(VIDEO_KINDS)}")
        idle = [f.name for f in fields(settings) if f.name not in USED and getattr(settings, f.name) != f.default]
        if idle:
            raise ValueError(f"{idle[0]}={getattr(settings, idle[0])!r}: is for images; leave it out for videos")
        self._begin(settings)
        self._read(train_data, val_data)
        settings, classes = self.settings, self.train_data.classes
        if self.train_data.task != "instance":
            raise ValueError(f"data={settings.data}: has stuff, and models of clips find instances")
        if not settings.no_check:
            check_split_headers(self.train_data, "train", show)
            check_split_headers(self.val_data, "val", show)
        torch.manual_seed(settings.seed)
        images, self.new_classes = starting_model(settings, self.recipe, classes, "instance")
        check_design(settings.anneal_masks, images.config)
        self.last = last_complete_checkpoint(settings.output) if settings.resume else None
        self.most = self.train_data.most_objects()
        self.queries_reason = fit_queries(settings, images, self.most, self.last)
        if self.most > images.config.num_queries:
            raise ValueError(
                f"queries={images.config.num_queries}: a video to train on has {self.most} objects, and each query "
                f"finds one; give queries={queries_for(self.most)}"
            )
        self.model = video_model(images)
        if settings.freeze_backbone is not None:
            freeze_backbone(self.model, settings.freeze_backbone)
        recipe, self.processor = _clips(settings, self.recipe)
        self.augmented = ClipDataset(self.train_data, recipe, settings.seed)
        self.side = max(recipe.short_sides)
        device = torch.device("cpu" if settings.cpu else default_device())
        check_memory(settings, self.model, self.side, device, frames=recipe.frames)
        self._finish()

    def _trainer(self) -> ClipTrainer:
        options = training_arguments(self.settings, self.recipe, "instance")
        save_activations(self.settings, self.model)
        data = {"train_dataset": self.augmented, "eval_dataset": self.val_data}
        return ClipTrainer(self.model, options, processor=self.processor, **data)


def _clips(settings: TrainingSettings, recipe: Recipe | None) -> tuple[ClipRecipe, Mask2FormerVideoProcessor]:
    """How clips are cut for training, and the processor for inference."""
    given = {} if recipe is None else dict(recipe.augmentation)
    if settings.short_sides or recipe is None:
        given["short_sides"] = tuple(settings.short_sides or DEFAULT_SIDES)
    clips = ClipRecipe(**given)
    size = {"shortest_edge": min(clips.short_sides), "longest_edge": LONGEST}
    if recipe is not None:
        size = dict(recipe.test_size)
    if settings.test_size:
        short, *long = settings.test_size
        size = {"shortest_edge": short, "longest_edge": long[0] if long else max(2 * short, LONGEST)}
    normalisation = normalisation_of(settings.model or settings.backbone or recipe, settings.random_weights)
    return clips, Mask2FormerVideoProcessor(size=size, **normalisation)
