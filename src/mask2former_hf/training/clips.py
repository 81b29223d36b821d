"""Train a model of clips: batches of them, a start from a model of images, and the original's optimizer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count

import torch
from torch.utils.data import DataLoader

from ..data.clips import NO_LABEL, Clip, ClipDataset
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from .collation import on_device
from .optimization import FROM_PRETRAINED, parameter_groups, polynomial_schedule


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


def train_clips(
    model: Mask2FormerForVideoSegmentation,
    clips: ClipDataset,
    processor: Mask2FormerVideoProcessor,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = FROM_PRETRAINED["learning_rate"],
    clip: float = FROM_PRETRAINED["clip"],
    backbone_multiplier: float = FROM_PRETRAINED["backbone_multiplier"],
    seed: int = 0,
    num_workers: int = 0,
    schedule: Callable = polynomial_schedule,
    progress: Callable[[Iterable], Iterable] = iter,
    on_step: Callable[[int, float], None] | None = None,
) -> int:
    """Train in place, on the model's device, as the original does: AdamW, gradients clipped as a whole.

    Args:
        clips: shuffled anew in every epoch; the last batch of an epoch is left out if it is not full.
        batch_size: clips per step.
        learning_rate, clip, backbone_multiplier: `optimization.FROM_PRETRAINED`, or of `FROM_RANDOM`.
        schedule: (optimizer, steps) → the learning rate's; the original's recipes for video have
            `optimization.multi_step_schedule` with milestones of their own.
        progress: wraps the numbers of the steps, such as `tqdm.tqdm`.
        on_step: called with the step's number and its loss.

    Returns:
        The steps done: fewer than asked for after Ctrl-C.
    """
    if steps < 1 or not 1 <= batch_size <= len(clips):
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}: must be 1 or more, and a batch no larger than the {len(clips)} "
            "videos there are"
        )
    groups = parameter_groups(model, learning_rate, backbone_multiplier=backbone_multiplier)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    rate = schedule(optimizer, steps)
    loader = DataLoader(
        clips,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=ClipCollator(processor, model.config.num_labels),
        generator=torch.Generator().manual_seed(seed),
    )

    def epoch(number: int):
        clips.set_epoch(number)
        return loader

    batches = chain.from_iterable(map(epoch, count()))
    model.train()
    done = 0
    try:
        for step, batch in zip(progress(range(steps)), batches, strict=False):
            batch = on_device(batch, model.device)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rate.step()
            done += 1
            if on_step is not None:
                on_step(step, loss.item())
    except KeyboardInterrupt:
        pass
    return done
