"""A training run from its settings: data, model, augmentation, recipe, resuming, results."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..data.augmentation import AugmentedDataset, Pipeline, augmentation_for
from ..data.kinds import KINDS, load_both, load_split
from ..data.reader import read_bands_of
from ..data.recognise import recognise
from ..evaluation.evaluator import SegmentationEvaluator
from ..inference.loading import LOADING_ERRORS, default_device, first_line, load_model
from ..model.channels import model_channels
from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.design_rules import classifies_pixels
from .annealing import check_design
from .backbones import BACKBONES, new_model, normalisation_of, queries_for
from .channels import Bands, bands_of_run, channels_of_run, check_channels, check_inflation
from .checkpoints import last_complete_checkpoint, saving
from .collation import processor_for
from .distillation import Distillation
from .feature_cache import FeatureCache, make_folder
from .freezing import freeze_backbone
from .inflation import MEAN, with_channels
from .label_surgery import model_for_classes, resize_queries
from .lora import ADAPTER, save_and_merge, with_lora
from .memory import check_batch_norm, check_memory
from .memory_budget import fit_budget
from .optimization import FROM_RANDOM
from .recipes import Recipe
from .run_arguments import training_arguments
from .run_data import check_segments, check_split_headers, findings_before, look_through_split
from .run_folder import RESULTS, StopAtSignal, check_output, steps_with_results, write_settings
from .run_lock import RunLock
from .run_log import RunLog
from .run_report import write_curves, write_results
from .setting_checks import check, check_packages, check_types
from .settings import DESIGNS, TrainingSettings, complete, starts_pretrained
from .trainer import Mask2FormerTrainer


class TrainingRun:
    """A run that is ready to train: made of its settings, with everything read and checked, and nothing written yet.

    `TrainingRun(TrainingSettings(output="run", backbone="tiny", data="scenes", steps=300)).train()`

    Args:
        settings: of the run.
        train_data, val_data: readers (`data.reader.Reader`), instead of those that the settings describe.
        show: bars while the annotations are read.

    Attributes:
        settings: with what the recipe and the defaults decided.
        recipe: the `Recipe` or None.
        given: those of learning rate, clip and backbone multiplier that were not left to the defaults.
        recognised: what was found in the folder of data, by setting.
        held_out: in words, what was kept to measure on.
        train_data, val_data: the readers; `augmented`: what the model is trained on, images of `side` pixels or so.
        model, processor: as they start; `new_classes`: names that the checkpoint did not know; `queries_reason`: why
            the model has so many queries.
        channels: bands of the images, None for photos; `bands`: how they are normalised.
        statistics: of the training data's annotations (`data.statistics.Statistics`); `findings`: what is suspicious
            in the data (`data.findings.Finding`).
        trainer: the `Mask2FormerTrainer`; `memory_line`: how a step fits the memory budget, in words, "" without one.
        log: the `RunLog`, which writes `log.txt` and `metrics.csv` into the output.
        last: the checkpoint that the run goes on from, or None; `finished`: it is the last one, and the results are
            there.

    Raises:
        ValueError, OSError: for settings, files or data that do not work; settings are named as `name=`.
        ImportError: for a package that is needed.
    """

    kinds = KINDS  # of data
    channels: int | None = None
    bands = Bands(None, {})
    memory_line = ""

    def __init__(self, settings: TrainingSettings, train_data=None, val_data=None, show: bool = True):
        self._begin(settings)
        check_channels(self.settings)
        self._read(train_data, val_data)
        settings = self.settings
        usual = "semantic" if classifies_pixels(settings) else self.train_data.task
        classes, task = self.train_data.classes, settings.task or usual
        torch.manual_seed(settings.seed)
        self.model, self.new_classes = starting_model(settings, self.recipe, classes, task)
        if classifies_pixels(self.model.config) and settings.task not in (None, "semantic"):
            raise ValueError(f"task={settings.task}: {settings.model} classifies pixels; leave it out, or 'semantic'")
        check_design(settings.anneal_masks, self.model.config)
        self.channels = channels_of_run(settings, self.model)
        for dataset in (self.train_data, self.val_data):
            read_bands_of(dataset, self.channels)
        if settings.freeze_backbone is not None:
            freeze_backbone(self.model, settings.freeze_backbone)
        surveys = [look_through_split(self.train_data, "train", show)]
        self.statistics = surveys[0].statistics
        self.statistics.check()
        self.last = last_complete_checkpoint(settings.output) if settings.resume else None
        self.queries_reason = fit_queries(settings, self.model, self.statistics.most, self.last)
        surveys.append(look_through_split(self.val_data, "val", show))
        check_segments(settings, self.model, *(one.statistics for one in surveys))
        self.model.config.class_table = classes.config_fields(self.statistics.pixels)["class_table"]
        if not settings.no_check:
            check_split_headers(self.train_data, "train", show)
            check_split_headers(self.val_data, "val", show)
        self.bands = bands_of_run(settings, self.channels, self.train_data)
        self.augmented, self.processor = _images(
            settings, self.recipe, self.train_data, self.model.config.task, self.bands
        )
        self.side = settings.crop or self.processor.size["shortest_edge"]
        self.findings = findings_before(surveys, self.side)
        check_batch_norm(settings, self.model, self.side, len(self.train_data))
        check_memory(settings, self.model, self.side, torch.device("cpu" if settings.cpu else default_device()))
        SegmentationEvaluator(self.model.config, self.processor, settings.metrics)  # not after the first steps
        self._finish()

    def _begin(self, settings: TrainingSettings):
        """Complete and check the settings."""
        check_types(settings)
        self.given = [name for name in FROM_RANDOM if getattr(settings, name) is not None]
        settings, self.recognised = _recognised(settings)
        settings, self.recipe = complete(settings)
        check(settings)
        check_packages(settings)
        self.settings = replace(settings, output=Path(settings.output))
        check_output(self.settings)
        if settings.feature_cache is not None:
            make_folder(settings.feature_cache)

    def _read(self, train_data, val_data):
        """Both splits, with one table of classes; and from then on a number of steps."""
        self.held_out = ""
        if train_data is None and val_data is None:
            self.train_data, self.val_data, self.held_out = load_both(self.settings, self.kinds)
        else:
            given = {"train": train_data, "val": val_data}
            self.train_data, self.val_data = (
                load_split(self.settings, split, self.kinds) if data is None else data for split, data in given.items()
            )
        if self.train_data.classes.id2label != self.val_data.classes.id2label:
            raise ValueError(
                f"the classes of the training and the validation data differ: {self.train_data.classes}; "
                f"{self.val_data.classes}. Give both readers the same classes="
            )
        self.settings = with_steps(self.settings, len(self.train_data))

    def _finish(self):
        """The trainer and its log, of what has been prepared."""
        try:
            self.trainer = self._trainer()
        except RuntimeError as error:  # transformers about settings that do not fit the machine
            raise ValueError(first_line(error)) from error
        self.log = RunLog(self.settings.output)
        self.trainer.add_callback(self.log)
        self.finished = self.last is not None and steps_with_results(self.settings.output) >= self.settings.steps

    def train(self) -> dict[str, float]:
        """Train, measure the best model, and write it with its card and figures into the output.

        Of a run that is finished already, everything stays as it is.

        Returns:
            The figures, `{"pq": 0.51, ...}`.

        Raises:
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when a checkpoint was saved.
            FolderInUse: if another run trains in the output.
            OSError: if the output cannot be written; complete checkpoints stay as they are.
        """
        if self.finished:
            return json.loads((self.settings.output / RESULTS).read_text())["metrics"]
        with RunLock(self.settings.output) as lock:
            self.trainer.add_callback(lock)
            return self._train()

    def _train(self) -> dict[str, float]:
        settings, trainer = self.settings, self.trainer
        if trainer.is_world_process_zero():
            settings.output.mkdir(parents=True, exist_ok=True)
            if self.last is None:
                write_settings(settings)
        kept = nullcontext() if settings.feature_cache is None else FeatureCache(self.model, settings.feature_cache)
        with StopAtSignal() as stop, kept:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=self.last)
            trainer.accelerator.wait_for_everyone()  # before one of them leaves
        trainer.remove_callback(stop)
        if trainer.is_world_process_zero():
            write_curves(settings, trainer)
        if stop.stopped and trainer.state.global_step < settings.steps:
            raise KeyboardInterrupt
        trainer.with_findings = True
        figures = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        if trainer.is_world_process_zero():
            with saving(settings.output):
                if settings.lora is not None:
                    trainer.model = save_and_merge(trainer.model, settings.output / ADAPTER)
                trainer.save_model(str(settings.output))
                trainer.create_model_card(finetuned_from=_base_model(settings), dataset=_data_name(settings))
            write_results(settings, trainer, figures)
        return figures

    def _largest(self) -> tuple[int, int]:
        """(height, width) of the largest canvas of a training batch."""
        if size := getattr(self.augmented, "pipeline", Pipeline(())).size:
            return size
        sides = [self.processor.size[f"{which}_edge"] for which in ("shortest", "longest")]
        if self.settings.batch_size > 1:  # upright and lying images together
            sides = [max(sides)] * 2
        divisor = self.processor.size_divisor
        return tuple(-(-side // divisor) * divisor for side in sides)

    def _trainer(self) -> Mask2FormerTrainer:
        settings, model = self.settings, self.model
        options = training_arguments(settings, self.recipe, model.config.task)
        save_activations(settings, model)
        distillation = _distillation(settings, model)
        if settings.lora is not None:
            model = with_lora(model, settings.lora, settings.lora_target, new_head=settings.model is None)
        self.memory_line = fit_budget(settings, model, self._largest(), self.statistics.most, options.device)
        return Mask2FormerTrainer(
            model,
            options,
            processor=self.processor,
            train_dataset=self.augmented,
            eval_dataset=self.val_data,
            augmented=settings.augmentation != "none",
            distillation=distillation,
            labelled=not settings.teacher_only,
        )


def _recognised(settings: TrainingSettings) -> tuple[TrainingSettings, dict]:
    """Settings with what lies in their folder, where they do not say otherwise; and what was taken from there."""
    if settings.folder is None:
        return settings, {}
    found = recognise(settings.folder, settings.data)
    taken = {name: value for name, value in found.items() if getattr(settings, name) is None}
    return replace(settings, **taken), taken


def _base_model(settings: TrainingSettings) -> str | None:
    """What the model started from, for the card: an id of the Hub, and no path, which is of this machine."""
    return None if settings.model is None or Path(settings.model).exists() else settings.model


def _data_name(settings: TrainingSettings) -> str | None:
    """What the data are called, for the card: no path, which is of this machine."""
    if settings.dataset and not Path(settings.dataset).exists():
        return settings.dataset
    place = settings.dataset or settings.folder
    if place is None:
        parts = [settings.train_images, settings.train_annotations, settings.train_maps]
        parts = [os.path.abspath(part) for part in parts if part is not None]
        place = os.path.commonpath(parts) if parts else settings.data
    return Path(place).name if place else None


def with_steps(settings: TrainingSettings, images: int) -> TrainingSettings:
    """Epochs in steps, as Trainer counts them."""
    if settings.epochs is None:
        return settings
    batches = -(-images // (settings.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    steps = max(1, round(settings.epochs * -(-batches // settings.accumulate)))
    return replace(settings, steps=steps)


def fit_queries(settings: TrainingSettings, model, most: int, last: str | None) -> str:
    """Give a new model, unless the settings say a number, queries for the fullest image; say why it has its number."""
    if classifies_pixels(model.config):
        return "one per class"
    if settings.queries is not None:
        return "as given" if settings.recipe is None else "as given, or the recipe's"
    if settings.model is not None:
        return "the checkpoint's own"
    usual = model.config.num_queries
    if last is not None:
        resize_queries(model, Mask2FormerConfig.from_pretrained(last).num_queries)
        return "those of the run that goes on"
    if most <= usual:
        return f"as usual; the fullest image to train on has {most} segments"
    resize_queries(model, queries_for(most))
    return f"a tenth more than the {most} segments of the fullest image to train on, instead of {usual}"


def starting_model(settings: TrainingSettings, recipe: Recipe | None, classes, task: str):
    """The model, and the names of the classes that a checkpoint did not know."""
    given = {name: getattr(settings, name) for name in ("mask_loss", "mask_weight", "vit_neck", *DESIGNS)}
    fields = {name: value for name, value in given.items() if value is not None}
    frozen = recipe is not None and recipe.backbone.get("norm") == "FrozenBN" and starts_pretrained(settings)
    if settings.freeze_batch_norm or frozen:
        fields["freeze_batch_norm"] = True
    if settings.encoder_exits:
        fields["encoder_exits"] = True
    if settings.model is not None:
        try:
            model = load_model(settings.model, **fields)
            check_inflation(settings, model_channels(model.config))
            if settings.channels not in (None, model_channels(model.config)):
                model = with_channels(model, settings.channels, settings.inflate or MEAN)
            return model_for_classes(model, classes, task, settings.queries)
        except ValueError as error:
            text = first_line(error).removeprefix(f"{settings.model}: ")
            raise ValueError(f"model={settings.model}: {text}") from error
    try:
        queries = {} if settings.queries is None else {"num_queries": settings.queries}
        start = settings.backbone or recipe
        bands = {"channels": settings.channels, "inflate": settings.inflate or MEAN}
        return new_model(start, classes, task, settings.random_weights, **bands, **fields, **queries), []
    except LOADING_ERRORS as error:
        if isinstance(error, StrictDataclassError):  # of settings that became fields of the config
            raise ValueError(first_line(error).replace("num_queries=", "queries=")) from error
        if settings.backbone in (None, *BACKBONES):
            raise
        known = ", ".join(BACKBONES)
        raise ValueError(
            f"backbone={settings.backbone}: must be one of {known}, or a folder or Hub id; {first_line(error)}"
        ) from error


def _images(settings: TrainingSettings, recipe: Recipe | None, train, task: str, bands: Bands):
    """The training images as they are augmented, and the processor for inference."""
    if settings.crop is None:
        pipeline, test_size = recipe.pipeline(), list(recipe.test_size.values())
    else:
        kind = None if settings.augmentation == "none" else settings.augmentation
        pipeline = augmentation_for(task, settings.crop, kind, settings.short_sides or ())
        test_size = [settings.crop]
    if bands.channels is not None:
        pipeline = pipeline.without_colour()
    short, *long = settings.test_size or test_size
    fields = {}
    if bands.channels is None:
        fields = normalisation_of(settings.model or settings.backbone or recipe, settings.random_weights)
    fields |= bands.fields
    fields |= {} if recipe is None else recipe.processor_fields()
    processor = processor_for(train.classes, short, long[0] if long else 2 * short, **fields)
    plain = settings.augmentation == "none"
    return train if plain else AugmentedDataset(train, pipeline, seed=settings.seed), processor


def save_activations(settings: TrainingSettings, model):
    """Switch gradient checkpointing on if the settings ask for it."""
    if settings.gradient_checkpointing:  # renamed in transformers 5.24, where the old name warns
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _distillation(settings: TrainingSettings, model) -> Distillation | None:
    if settings.teacher is None:
        return None
    try:
        teacher = load_model(settings.teacher)
        if model_channels(teacher.config) != model_channels(model.config):
            raise ValueError(
                f"takes images of {model_channels(teacher.config)} channels, and the model of "
                f"{model_channels(model.config)}; a teacher sees what its student sees"
            )
        return Distillation(teacher, model, weight=settings.teacher_weight, cache=settings.teacher_cache)
    except (OSError, ValueError) as error:
        text = first_line(error).removeprefix(f"{settings.teacher}: ")
        raise ValueError(f"teacher={settings.teacher}: {text}") from error
