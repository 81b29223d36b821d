"""Train transformers' own Mask2Former with this package's loss: the same logits in, less time and memory.

    python examples/stock_with_our_criterion.py [CHECKPOINT] [--steps 20]

The criterion takes plain logits of any mask classification model, (layers, batch, queries, ...), and binary masks of
any dtype per image. Here it replaces the loss that stock's model would compute itself if it got labels.
"""

import argparse

import torch
import transformers
from tqdm import tqdm

from mask2former_hf import (
    LossSettings,
    Mask2FormerImageProcessor,
    Mask2FormerLoss,
    Scenes,
    ScenesDataset,
    SegmentationCollator,
    loss_weights,
    parameter_groups,
)

NAMES = Scenes.classes.id2label


class StockWithOurCriterion(torch.nn.Module):
    """Stock's network, our loss; what it returns is stock's output with `loss` and `loss_dict`."""

    def __init__(self, model: transformers.Mask2FormerForUniversalSegmentation):
        super().__init__()
        self.model, config = model, model.config
        self.weights = loss_weights(config)
        self.criterion = Mask2FormerLoss(LossSettings.from_config(config))

    def forward(self, pixel_values, pixel_mask, mask_labels, class_labels, ignore_masks=None):
        output = self.model(pixel_values, pixel_mask=pixel_mask, output_auxiliary_logits=True)
        layers = [*output.auxiliary_logits, output]
        output.loss_dict = self.criterion(
            torch.stack([layer["class_queries_logits"] for layer in layers]),
            torch.stack([layer["masks_queries_logits"] for layer in layers]),
            mask_labels,
            class_labels,
            ignore_masks,
        )
        output.loss = sum(self.weights[name] * term.sum() for name, term in output.loss_dict.items())
        return output


def small_model():
    """A randomly initialised stock model for generated scenes."""
    backbone = transformers.SwinConfig(
        embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=128,
        encoder_layers=2, decoder_layers=4, num_attention_heads=4, dim_feedforward=128, num_queries=20,
        train_num_points=512, id2label=NAMES, label2id={name: label for label, name in NAMES.items()},
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def main(checkpoint: str | None = None, steps: int = 20, learning_rate: float = 5e-4) -> list[float]:
    """Train on generated scenes; returns the losses."""
    torch.manual_seed(0)
    if checkpoint is None:
        stock = small_model()
    else:
        stock = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
            checkpoint, id2label=NAMES, ignore_mismatched_sizes=True
        )
    model = StockWithOurCriterion(stock).train()
    optimizer = torch.optim.AdamW(parameter_groups(stock, learning_rate, backbone_multiplier=1.0))
    collate, scenes = (
        SegmentationCollator(Mask2FormerImageProcessor(do_resize=False)),
        ScenesDataset(4 * steps, size=128),
    )
    losses = []
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        output = model(**collate([scenes[4 * step + index] for index in range(4)]))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.checkpoint, arguments.steps)
