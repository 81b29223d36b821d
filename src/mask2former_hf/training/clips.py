"""What a model of clips is trained on, and with: batches of clips, a start from a model of images, and the trainer."""

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.trainer_utils import EvalLoopOutput

from ..data.clips import NO_LABEL, Clip
from ..evaluation.evaluator import evaluation_loader, forward_in
from ..evaluation.processes import process_rank
from ..evaluation.videos import evaluate_videos, headline_of_videos
from ..inference.video_segmenter import VideoSegmenter
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from .trainer import Mask2FormerTrainer


class ClipCollator:
    """Batch clips that a `ClipRecipe` has brought to their size.

    Args:
        processor: normalises and pads.
        num_labels: of the model; an object without a label gets this number, which the loss knows as "not known".
    """

    def __init__(self, processor: Mask2FormerVideoProcessor, num_labels: int):
        self.processor, self.num_labels = processor, num_labels

    def __call__(self, clips: Sequence[Clip]) -> dict:
        """Clips → pixel_values_videos, pixel_mask, mask_labels (N, T, h, w) and class_labels (N,)."""
        videos = [clip.frames for clip in clips]
        options = {"do_resize": False, "input_data_format": "channels_last", "return_tensors": "pt"}
        labels = [torch.from_numpy(clip.labels) for clip in clips]
        return dict(self.processor(videos, **options)) | {
            "mask_labels": [torch.from_numpy(clip.masks.view("uint8").copy()) for clip in clips],
            "class_labels": [own.masked_fill(own == NO_LABEL, self.num_labels) for own in labels],
        }


def video_model(model: Mask2FormerForUniversalSegmentation) -> Mask2FormerForVideoSegmentation:
    """A model of clips with the tensors of a model of images, copied; make other classes before (`label_surgery`)."""
    clips = Mask2FormerForVideoSegmentation(model.config)
    clips.load_state_dict(model.state_dict())
    return clips.to(model.device)


class ClipTrainer(Mask2FormerTrainer):
    """`Mask2FormerTrainer` of `Mask2FormerForVideoSegmentation`, whose data are clips and whose figures are tracks'.

    Args:
        train_dataset: `data.clips.ClipDataset`.
        eval_dataset: `data.videos.VideoReader`; every video counts whole.
        kwargs: others of `Mask2FormerTrainer`, such as `model`, `args` and `processor`.
    """

    def __init__(self, model: Mask2FormerForVideoSegmentation, *args, processor, **kwargs):
        kwargs.setdefault("data_collator", ClipCollator(processor, model.config.num_labels))
        super().__init__(model, *args, processor=processor, augmented=True, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is missing: give it to the trainer or to `evaluate`")
        return evaluation_loader(dataset, batch_size=1)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Figures of the videos (`evaluation.videos.headline_of_videos`) in the weights' precision, as for images."""
        model = self.accelerator.unwrap_model(self.model).to(self.args.device)
        half = torch.bfloat16 if self.args.bf16_full_eval else torch.float16 if self.args.fp16_full_eval else None
        training, videos = model.training, dataloader.dataset.dataset.dataset
        hidden = self.args.disable_tqdm or process_rank()[0] != 0

        def progress(numbered):
            return tqdm(numbered, desc="evaluating", unit="video", disable=hidden, leave=False)

        try:
            segmenter = VideoSegmenter.of(model, self.processor, task="instance")
            with forward_in(half, model, self.args.device):
                figures = headline_of_videos(evaluate_videos(segmenter, videos, progress=progress))
        finally:
            model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(videos))
