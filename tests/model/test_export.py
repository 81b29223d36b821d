"""`torch.export` of inference, as far as the backbone allows it."""

import pytest
import torch
from helpers import random_targets, tiny_model
from torch.export import Dim, export


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        output = self.model(pixels)
        return output.class_queries_logits, output.masks_queries_logits


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_a_fixed_size_exports(backbone):
    module, pixels = Logits(tiny_model(backbone, encoder_layers=1, decoder_layers=2)), torch.randn(2, 3, 64, 96)
    program = export(module, (pixels,))
    torch.testing.assert_close(program.module()(pixels), module(pixels))


def test_batch_height_and_width_can_be_dynamic_with_a_convolutional_backbone():
    """Not with Swin: transformers' class decides in Python which maps need window padding."""
    module = Logits(tiny_model("resnet", encoder_layers=1, decoder_layers=2))
    shapes = {0: Dim("batch", max=8), 2: 32 * Dim("rows", max=40), 3: 32 * Dim("columns", max=40)}
    program = export(module, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(shapes,), strict=False)
    for size in ((1, 3, 128, 64), (3, 3, 160, 224)):
        pixels = torch.randn(size)
        torch.testing.assert_close(program.module()(pixels), module(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["swin"])
def test_a_compiled_training_forward_breaks_at_the_criterion_only(backbone):
    model = tiny_model(backbone, encoder_layers=1, decoder_layers=2).train()
    masks, labels = random_targets([3, 2], (64, 64))
    batch = {"mask_labels": masks, "class_labels": labels, "pixel_mask": torch.ones(2, 64, 64)}
    torch._dynamo.reset()
    report = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64), **batch)
    places = {frame.name for reason in report.break_reasons for frame in reason.user_stack[-1:]}
    assert places == {"_loss_terms"} and all("Mask2FormerLoss.forward" in x.reason for x in report.break_reasons)
