"""The arguments of Trainer that follow from a run's settings."""

from ..evaluation.evaluator import METRICS
from .recipes import Recipe
from .settings import TrainingSettings
from .trainer import Mask2FormerTrainingArguments


def training_arguments(settings: TrainingSettings, recipe: Recipe | None, task: str) -> Mask2FormerTrainingArguments:
    every = settings.eval_every or max(1, settings.steps // 10)
    milestones = None
    if recipe is not None and recipe.milestones:  # at the same fraction of a shorter run
        milestones = [round(step / recipe.iterations * settings.steps) for step in recipe.milestones]
    usual = METRICS[task][0]
    metric = usual if usual in (settings.metrics or METRICS[task]) else settings.metrics[0]
    return Mask2FormerTrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        backbone_multiplier=settings.backbone_multiplier,
        layer_decay=settings.layer_decay,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        schedule="multistep" if milestones else "poly",
        milestones=milestones,
        warmup_steps=settings.warmup or 0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=settings.keep,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        anneal_masks=settings.anneal_masks,
        eval_metrics=settings.metrics,
        logging_steps=settings.log_every,
        report_to=settings.report_to,
        dataloader_num_workers=settings.num_workers,
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        use_cpu=settings.cpu,
        ddp_find_unused_parameters=False,
    )
