"""transformers' Trainer with the paper's recipe, loss terms in the log, and evaluation that keeps no predictions."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length, rotate_checkpoints

from ..evaluation.evaluator import (
    SegmentationEvaluator,
    evaluation_loader,
    headline,
    merge_processes,
    run_evaluation,
)
from ..evaluation.matching_classes import with_classes_of
from ..evaluation.processes import process_rank
from ..hub.model_card import write_model_card
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from .annealing import MaskAnnealing, check_design, check_span
from .checkpoints import COMPLETE, last_complete_checkpoint, saving
from .collation import SegmentationCollator
from .distillation import Distillation
from .epochs import EpochReachesData
from .optimization import (
    BACKBONE_MULTIPLIER,
    GRADIENT_NORM,
    LEARNING_RATE,
    WEIGHT_DECAY,
    match_gradient_strides,
    multi_step_schedule,
    parameter_groups,
    polynomial_schedule,
)
from .teacher import WithImageIds

SCHEDULES = ("poly", "multistep", "trainer")


@dataclass
class Mask2FormerTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the original's recipe as defaults; batch size and steps are the user's."""

    learning_rate: float = field(default=LEARNING_RATE, metadata={"help": "of everything but the backbone"})
    weight_decay: float = field(default=WEIGHT_DECAY, metadata={"help": "of what is neither norm nor embedding"})
    max_grad_norm: float = field(default=GRADIENT_NORM, metadata={"help": "largest norm of all gradients together"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "examples go to the collator whole"})
    backbone_multiplier: float = field(
        default=BACKBONE_MULTIPLIER, metadata={"help": "factor on the backbone's learning rate"}
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "further factor on it for each layer below the backbone's end"}
    )
    schedule: str = field(
        default="poly", metadata={"help": "'poly', 'multistep', or 'trainer' for lr_scheduler_type's"}
    )
    milestones: list[int] | None = field(default=None, metadata={"help": "steps of the drops of 'multistep'"})
    anneal_masks: list[float] | None = field(
        default=None, metadata={"help": "start and end of `training.annealing`, as shares of the steps"}
    )
    eval_metrics: list[str] | None = field(default=None, metadata={"help": "pq, ap, box_ap, miou; by task if unset"})

    def __post_init__(self):
        super().__post_init__()
        if self.device.type == "cpu":  # where torch warns that pinning does nothing
            self.dataloader_pin_memory = False
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(
                f"schedule={self.schedule!r} with milestones={self.milestones}: 'multistep' takes the steps at which "
                "the learning rate drops, the others take none"
            )
        if self.anneal_masks is not None:
            check_span(self.anneal_masks)


class Mask2FormerTrainer(Trainer):
    """Trains and measures `Mask2FormerForUniversalSegmentation` on annotated examples (`data.example.Example`).

    Besides what Trainer does: the paper's parameter groups and schedules; the loss is normalised over all processes
    and micro-batches of a step, so that gradient accumulation gives the gradient of the large batch; every term of
    the loss is logged; evaluation reduces each image to the metrics' counts on the spot and merges those across
    processes; a checkpoint counts only once it is complete: a run killed while saving resumes from the one before;
    the epoch reaches augmentation and streams (`set_epoch`), so that a resumed run sees what the whole one would.

    Args:
        processor: of the model; also the `processing_class`.
        eval_thresholds: `threshold`, `overlap_threshold` and `top_k` of `SegmentationEvaluator`.
        augmented: whether `train_dataset` gives examples at their final size (`data.augmentation.AugmentedDataset`);
            otherwise the processor resizes them.
        distillation: `training.distillation.Distillation` of a teacher for this model; its terms are added to the
            loss and logged.
        labelled: False to learn from the teacher alone, from images whose annotations are not looked at.
        kwargs: of `transformers.Trainer`.

    Attributes:
        annealing: the `MaskAnnealing` of `args.anneal_masks`, or None.
        with_findings: gather in evaluations what a report shows; then `measured` is the evaluator of the last one.
    """

    def __init__(
        self,
        *args,
        processor: Mask2FormerImageProcessor,
        eval_thresholds: dict | None = None,
        augmented: bool = False,
        distillation: Distillation | None = None,
        labelled: bool = True,
        **kwargs,
    ):
        if distillation is None and not labelled:
            raise ValueError("labelled=False: training without labels needs distillation, from a teacher")
        collator = SegmentationCollator(processor, resize=not augmented)
        if distillation is not None and distillation.uses_cache:
            collator = WithImageIds(collator)
        kwargs.setdefault("data_collator", collator)
        super().__init__(*args, processing_class=processor, **kwargs)
        self.add_callback(EpochReachesData())
        self.annealing = None
        if self.args.anneal_masks is not None:
            check_design(self.args.anneal_masks, self.model.config)
            self.annealing = MaskAnnealing(*self.args.anneal_masks)
            self.add_callback(self.annealing)
        if self.args.world_size > 1:
            match_gradient_strides(self.model)
        self.processor, self.eval_thresholds = processor, eval_thresholds or {}
        # The model gets normalisers of the whole step: Trainer must not divide by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self.distillation, self.labelled = distillation, labelled
        self.with_findings, self.measured = False, None
        if distillation is not None:
            distillation.to(self.args.device)
            distillation.teacher.to(self.args.device)
        self._term_sums: dict[str, torch.Tensor] = {}  # since the last log
        self._term_steps = 0  # number of the step that they begin with

    def replace_progress(self, callback: type):
        """Show progress by another callback than `ProgressCallback`."""
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(callback)

    # Training

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, with a source of worker seeds of its own (`EpochReachesData` sets it).

        Otherwise every new iterator takes one from the state that draws points, and a resumed run makes other
        iterators than the whole run did.
        """
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def parameter_groups(self, model=None) -> list[dict]:
        """Of the model, with learning rate and weight decay; see `training.optimization.parameter_groups`."""
        names = ("learning_rate", "weight_decay", "backbone_multiplier", "layer_decay")
        options = {name: getattr(self.args, name) for name in names}
        return parameter_groups(self.model if model is None else model, **options)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = self.parameter_groups(model)
            if self.distillation is not None:
                own = list(self.distillation.parameters())
                groups += [{"params": own, "lr": self.args.learning_rate, "weight_decay": 0.0}] if own else []
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            if self.args.schedule == "trainer":
                return super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            if self.args.schedule == "poly":
                self.lr_scheduler = polynomial_schedule(optimizer, num_training_steps, warmup=warmup)
            else:
                self.lr_scheduler = multi_step_schedule(optimizer, self.args.milestones, warmup=warmup)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device):
        """The loss' normalisers of all micro-batches of a step, averaged over processes; Trainer hands them on."""
        if not batch_samples:
            return None
        model = self.accelerator.unwrap_model(self.model)
        sums = model.criterion.normalizers(batch_samples, model.config.num_queries).to(device)
        return self.accelerator.reduce(sums, "mean")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is not None:
            inputs = {**inputs, "normalizers": num_items_in_batch}
        teach = self.distillation is not None and model.training
        if teach:
            names = () if self.labelled else ("mask_labels", "class_labels", "ignore_masks", "normalizers")
            batch = inputs
            inputs = {name: value for name, value in inputs.items() if name not in (*names, "image_ids")}
            inputs |= {"output_hidden_states": True, "output_auxiliary_logits": None if self.labelled else True}
        outputs = model(**inputs)
        loss, terms = outputs.loss, dict(outputs.loss_dict or {})
        if teach:
            taught = self.distillation(outputs, batch)
            # These are means over a micro-batch, not sums that were divided by the whole step's.
            taught = {name: term / self.current_gradient_accumulation_steps for name, term in taught.items()}
            loss, terms = sum(taught.values(), 0.0 if loss is None else loss), terms | taught
        if model.training:
            for name, values in terms.items():
                self._add_term(name, values.detach().sum())
        return (loss, outputs) if return_outputs else loss

    def _add_term(self, name: str, value: torch.Tensor):
        if not self._term_sums:
            self._term_steps = self.state.global_step
        self._term_sums[name] = self._term_sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self._term_sums:
            steps = self.state.global_step - self._term_steps
            names = sorted(self._term_sums)
            sums = self.accelerator.reduce(torch.stack([self._term_sums[name] for name in names]), "mean")
            logs |= {name: value / max(steps, 1) for name, value in zip(names, sums.tolist(), strict=True)}
            self._term_sums = {}
        super().log(logs, start_time)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ValueError("eval_dataset is missing: give it to the trainer or to `evaluate`")
        dataset = with_classes_of(self.accelerator.unwrap_model(self.model).config, dataset)
        return evaluation_loader(dataset, self.args.eval_batch_size, self.args.dataloader_num_workers)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Metrics of the dataset; predictions are not kept, so the output has none.

        In the weights' precision, as `evaluate` measures the checkpoint, also where training is in mixed precision;
        with `bf16_full_eval` or `fp16_full_eval` the forward pass is in autocast.
        """
        model = self.accelerator.unwrap_model(self.model)
        model.to(self.args.device)
        half = torch.bfloat16 if self.args.bf16_full_eval else torch.float16 if self.args.fp16_full_eval else None
        options = {**self.eval_thresholds, "findings": self.with_findings}
        evaluator = SegmentationEvaluator(model.config, self.processor, self.args.eval_metrics, **options)
        show = not self.args.disable_tqdm and process_rank()[0] == 0
        images = run_evaluation(model, dataloader, evaluator, progress=show, autocast=half)
        images = int(self.accelerator.reduce(torch.tensor(images, device=self.args.device), "sum"))
        evaluator = merge_processes(evaluator)
        self.measured = evaluator if self.with_findings else None
        figures = headline(evaluator.compute())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=images)

    # Checkpoints

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Trainer's, but while masks are annealed none is the best: the run's model would need them."""
        if self.annealing is not None and not self.annealing.is_over(self.state):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model, trial):
        """Trainer's, and the mark of completeness.

        Raises:
            OSError: if the disk is full or gone; the half-written folder is removed, complete ones are as they were.
        """
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        # An old one goes once the new is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(checkpoint):
                super()._save_checkpoint(model, trial)
                if self.args.should_save and not (checkpoint / "config.json").exists():
                    self.accelerator.unwrap_model(self.model).config.save_pretrained(checkpoint)  # an adapter has none
        except OSError:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / COMPLETE).touch()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def create_model_card(
        self, license: str | None = None, finetuned_from: str | None = None, dataset: str | None = None, **kwargs
    ):
        """Write the package's model card, with the figures of the last evaluation, into `output_dir`."""
        if not self.is_world_process_zero():
            return
        evaluations = [row for row in self.state.log_history if "eval_runtime" in row]
        figures = {name.removeprefix("eval_"): value for name, value in (evaluations or [{}])[-1].items()}
        others = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step", "switches")
        write_model_card(
            self.accelerator.unwrap_model(self.model),
            self.args.output_dir,
            self.processor,
            repo_id=self.hub_model_id if self.args.push_to_hub else None,
            dataset=dataset,
            metrics={name: 100 * value for name, value in figures.items() if name not in others},
            unit="percent",
            training_arguments=self.args,
            license=license,
            base_model=finetuned_from,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last complete checkpoint of `output_dir`.

        From the checkpoint of a run that did all its steps nothing is trained; the best model, or the last, is loaded.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: {self.args.output_dir} has no complete checkpoint; train without it"
                )
        if resume_from_checkpoint and self._is_finished(resume_from_checkpoint):
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            self._load_from_checkpoint(best if best and Path(best).is_dir() else resume_from_checkpoint)
            if self.annealing is not None:
                self.annealing.follow(self.model, self.state)
            return TrainOutput(self.state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _is_finished(self, checkpoint: str) -> bool:
        """Whether a checkpoint has all steps of the run; then the state is its state."""
        path = Path(checkpoint) / TRAINER_STATE_NAME
        state = TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()
        steps = self.args.max_steps
        if steps <= 0:
            batches = len(self.get_train_dataloader()) if has_length(self.train_dataset) else math.inf
            steps = math.ceil(self.args.num_train_epochs * -(-batches // self.args.gradient_accumulation_steps))
        if state.global_step < steps:
            return False
        self.state = state
        return True
