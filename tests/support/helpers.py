"""Small checkpoints, random batches and the recorded tensors of the original that many tests need."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ConvNextConfig, ResNetConfig, SwinConfig

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.data.scenes import ScenesDataset

SUPPORT = Path(__file__).resolve().parent  # what worker processes import from
SHARED = SUPPORT.parents[2] / "shared"
GOLDEN = SHARED / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden tensors of the original (../shared) not found")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "swin": lambda: SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=STAGES,
    ),
    "resnet": lambda: ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    ),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=STAGES),
}


def tiny_fields(**changes):
    """Fields of a small model that stock transformers understands as well."""
    fields = {
        "feature_size": 32,
        "mask_feature_size": 24,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "num_attention_heads": 4,
        "dim_feedforward": 48,
        "num_queries": 10,
        "train_num_points": 64,
        "num_labels": 5,
    }
    return fields | changes


def tiny_config(backbone="swin", **changes):
    return Mask2FormerConfig(backbone_config=BACKBONES[backbone](), **tiny_fields(**changes))


def randomise(model, seed=0):
    """Give every parameter and statistic a value that makes mistakes visible (zeros and ones hide them)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("empty_weight") or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel() ** 0.5))
            else:
                tensor.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


class Packed(torch.Tensor):
    """A weight of a class of its own without memory of its own, as quantized and distributed ones are: it knows the
    operators that torch's modules call, and no others."""

    KNOWN = ("detach", "t", "mm", "addmm", "linear", "convolution", "native_batch_norm")

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name not in cls.KNOWN:
            raise NotImplementedError(f"{operator} of a {cls.__name__}")
        output = operator(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return cls(output) if name in ("detach", "t") else output


def pack_weights(module, *kinds):
    """Give the modules of these kinds weights of another class."""
    for part in module.modules():
        if isinstance(part, kinds):
            part.weight = torch.nn.Parameter(Packed(part.weight.detach()), requires_grad=False)
    return module


def tiny_model(backbone="swin", **changes):
    return randomise(Mask2FormerForUniversalSegmentation(tiny_config(backbone, **changes))).eval()


@torch.no_grad()
def teach(model, inputs, labels):
    """Solve the heads so that query n says `labels[n]` on a region of its own of the one image, surely.

    The model needs `decoder_layers=1`: without masked attention the heads do not change the states that they read.
    """
    decoder = model.model.transformer_module.decoder
    outputs = model(**inputs)
    states = decoder.layernorm(outputs.transformer_decoder_last_hidden_state)[0].double()  # (Q, C)
    features = outputs.pixel_decoder_last_hidden_state[0].flatten(1).double()  # (C, S)
    axes = torch.linalg.svd(features - features.mean(1, keepdim=True), full_matrices=False)[2][:2]
    region = (axes[0] > 0) * 2 + (axes[1] > 0)  # (S,), four that a linear function of the features can tell apart
    masks = torch.stack([8.0 * (region == n % 4) - 4 for n in range(len(states))]).double()
    hidden = decoder.mask_predictor.mask_embedder[:2](states.float()).double()
    _solve(decoder.mask_predictor.mask_embedder[2][0], hidden, masks @ torch.linalg.pinv(features))
    classes = torch.full((len(states), model.config.num_labels + 1), -6.0).double()
    for query in range(len(states)):
        classes[query, labels[query] if query < len(labels) else -1] = 6.0
    _solve(model.class_predictor, states, classes)


def make_small_heads(monkeypatch):
    """Let new models have a head as small as `tiny_model`'s, whatever their backbone."""
    fields = {name: value for name, value in tiny_fields().items() if name != "num_labels"}
    monkeypatch.setattr("mask2former_hf.training.backbones.Mask2FormerConfig", partial(Mask2FormerConfig, **fields))


def sure_checkpoint(tmp_path_factory, **fields):
    """A folder with a random network that is sure of something, and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("resnet", **fields)
    model.class_predictor.bias.data[:5] += 6
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def least_budget(capsys, command):
    """What `train` calls the least memory, in GB, as it stands in a command; nothing is written."""
    assert main([*map(str, command), "--steps", "1", "--memory-budget", "0.001"]) == 2
    return re.search(r"takes at least (0\.\d+) GB", capsys.readouterr().err).group(1)


def _solve(linear, inputs, outputs):
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    solution = torch.linalg.lstsq(torch.cat([inputs, ones], 1), outputs, driver="gelsd").solution.float()
    linear.weight.copy_(solution[:-1].T)
    linear.bias.copy_(solution[-1])


def random_targets(counts, size, num_labels=5, seed=0):
    """Per image (N, H, W) uint8 rectangles and (N,) labels."""
    rng = np.random.default_rng(seed)
    masks, labels = [], []
    for count in counts:
        image = np.zeros((count, *size), dtype=np.uint8)
        for mask in image:
            top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
            height, width = rng.integers(4, size[0] // 2), rng.integers(4, size[1] // 2)
            mask[top : top + height, left : left + width] = 1
        masks.append(torch.from_numpy(image))
        labels.append(torch.from_numpy(rng.integers(0, num_labels, count)))
    return masks, labels


def padded_batch(sizes, divisor=32, seed=0):
    """Noise images of the given sizes, padded to the largest canvas, with their pixel mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.long)
    for index, (h, w) in enumerate(sizes):
        pixels[index, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[index, :h, :w] = 1
    return pixels, mask


def relative_difference(ours, theirs):
    """Largest difference in units of the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


class GoldenCase:
    """Inputs, weights and results of one network of the original (golden/README.md)."""

    num_frames = 1  # rows of the loss per target

    def __init__(self, name):
        self.folder = GOLDEN / name
        self.read(load_file(self.folder / "inputs.safetensors"))
        self.num_layers = len(self.json("losses.json")["unweighted"]) // 3

    def read(self, tensors):
        """Images as the network gets them, and their targets."""
        mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        images = [(tensors[f"image.{b}"].float() - mean) / std for b in range(sum("image." in key for key in tensors))]
        sizes = [tuple(image.shape[1:]) for image in images]
        height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes, strict=True))
        self.pixel_values = torch.zeros(len(images), 3, height, width)
        self.pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long)
        for b, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            self.pixel_values[b, :, :h, :w] = image
            self.pixel_mask[b, :h, :w] = 1
        self.mask_labels = [tensors[f"target.{b}.masks"] for b in range(len(images))]
        self.class_labels = [tensors[f"target.{b}.labels"] for b in range(len(images))]
        self.outputs = load_file(self.folder / "outputs.safetensors")

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def model(self, tmp_path):
        """Our model with the original's weights, translated by name."""
        from mask2former_hf.conversion.original import convert_state_dict

        fields = json.loads((GOLDEN / "swin_coco_panoptic" / "hf" / "config.json").read_text())
        if (self.folder / "hf").is_dir():
            fields = self.json("hf/config.json")
        else:  # swin_ade_semantic_prenorm
            fields |= {"pre_norm": True, "enforce_input_projection": True, "decoder_layers": self.num_layers}
            fields["backbone_config"] |= {"depths": [1, 1, 1, 1], "use_absolute_embeddings": True, "image_size": 64}
            fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(150)}
            fields["label2id"] = {f"LABEL_{i}": i for i in range(150)}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file(convert_state_dict(load_file(self.folder / "model.safetensors")), tmp_path / "model.safetensors")
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        return model.eval()

    def replay(self, criterion):
        """Make the criterion use the recorded points (drawn for the last layer first, then for layer 0, 1, ...)."""
        record = load_file(self.folder / "loss_record.safetensors")
        num_images, counts = len(self.class_labels), [len(labels) * self.num_frames for labels in self.class_labels]
        rand = iter(record[key] for key in sorted(record) if key.startswith("rand."))
        draws = {}
        for layer in (self.num_layers - 1, *range(self.num_layers - 1)):
            matching = [next(rand) for _ in range(num_images)]
            draws[layer] = {
                "matching": [points[0] for points in matching],
                "candidates": next(rand).split(counts),
                "uniform": next(rand).split(counts),
            }

        def draw_points(purpose, image, layers, shape, device, generator):
            points = torch.stack([draws[layer][purpose][image] for layer in range(self.num_layers)[layers]])
            assert points.shape[1:] == torch.Size(shape)[1:]
            return points

        criterion.draw_points = draw_points


@pytest.fixture(params=["swin_coco_panoptic", "r50_coco_panoptic", "swin_ade_semantic_prenorm"])
def golden_case(request):
    return GoldenCase(request.param)


def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def generated_scene(index=0, size=(72, 96)):
    return ScenesDataset(index + 1, size=size)[index]
