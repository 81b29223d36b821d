"""The loss of several processes is that of one."""

import torch
from helpers import (
    random_targets,
    tiny_model,
)
from processes import two_pythons

WORKER = """
import sys, torch
from helpers import random_targets, tiny_model
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = tiny_model("convnext", importance_sample_ratio=0.0).train()
pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
masks, labels = random_targets([3, 1, 0, 6], (64, 64))
points = torch.rand(4, 4, 10, 64, 2, generator=torch.Generator().manual_seed(6))
part = slice(2 * rank, 2 * rank + 2)
def draw(purpose, image, layers, shape, device, generator):
    own = points[2 * rank + image]
    return own[0, :1] if purpose == "matching" else own[layers, : shape[1], : shape[2]]
model.criterion.draw_points = draw
parallel = torch.nn.parallel.DistributedDataParallel(model)
parallel(pixels[part], mask_labels=masks[part], class_labels=labels[part]).loss.backward()
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[1])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Halves of a batch on two gloo processes against the whole on one; stock is off by the world size."""
    result = tmp_path / "gradients.pt"
    for done in two_pythons("-c", WORKER, result):
        assert done.returncode == 0, done.stderr[-3000:]
    model = tiny_model("convnext", importance_sample_ratio=0.0).train()
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    masks, labels = random_targets([3, 1, 0, 6], (64, 64))
    points = torch.rand(4, 4, 10, 64, 2, generator=torch.Generator().manual_seed(6))
    model.criterion.draw_points = lambda purpose, image, layers, shape, *rest: (
        points[image][0, :1] if purpose == "matching" else points[image][layers, : shape[1], : shape[2]]
    )
    model(pixels, mask_labels=masks, class_labels=labels).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in ours.values() if gradient is not None)
    for name, gradient in torch.load(result).items():
        expected = ours[name]
        if expected is None:
            assert gradient is None, name
            continue
        scale = expected.abs().max().clamp(min=1e-2 * largest)  # a bias before a norm gets rounding errors alone
        assert ((gradient - expected).abs().max() / scale) <= 1e-4, name
