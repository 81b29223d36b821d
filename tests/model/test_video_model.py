"""The model of clips: against the original's recorded tensors, a loss written out naively, and the image model."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, GoldenCase, needs_golden, randomise, relative_difference, tiny_config
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.core_model_loading import revert_weight_conversion

from mask2former_hf import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
)
from mask2former_hf.conversion.architecture import infer_architecture, make_config
from mask2former_hf.conversion.detectron2_config import settings_from_yaml
from mask2former_hf.conversion.original import convert_state_dict, restore_state_dict
from mask2former_hf.model.matcher import assign
from mask2former_hf.model.modeling_mask2former_video import Mask2FormerVideoTransformerModule
from mask2former_hf.model.video_postprocessing import video_instance_segmentation

TERMS = {"loss_cross_entropy": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def tiny_video_model(backbone="resnet", **changes):
    return randomise(Mask2FormerForVideoSegmentation(tiny_config(backbone, **changes))).eval()


def random_clips(counts, num_frames, size, num_labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(n, num_frames, 4, 6, generator=generator) > 0.6 for n in counts]
    masks = [
        F.interpolate(m.float(), size=size).bool() if len(m) else m.new_zeros(0, num_frames, *size) for m in coarse
    ]
    return masks, [torch.randint(0, num_labels, (n,), generator=generator) for n in counts]


class GoldenClips(GoldenCase):
    """Two clips of two frames, and the original's network on them."""

    num_frames = 2

    def __init__(self, name):
        self.folder = GOLDEN / name
        self.tensors, self.outputs = (load_file(self.folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
        self.mask_labels = [self.tensors[f"prepared{clip}.masks"] for clip in range(2)]
        self.class_labels = [self.tensors[f"prepared{clip}.labels"] for clip in range(2)]
        self.record = self.json("losses.json")
        self.num_layers = len(self.record["unweighted"]) // 3
        frames = [self.tensors[f"video{clip}.frame{frame}"] for clip in range(2) for frame in range(2)]
        self.pixel_values_videos = self.normalised(frames, self.mask_labels[0].shape[-2:]).unflatten(0, (2, 2))

    @staticmethod
    def normalised(frames, canvas):
        mean, std = (torch.tensor(x)[:, None, None] for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
        pixels = torch.zeros(len(frames), 3, *canvas)
        for image, frame in zip(pixels, frames, strict=True):
            image[:, : frame.shape[1], : frame.shape[2]] = (frame.float() - mean) / std
        return pixels

    def model(self):
        state = load_file(self.folder / "model.safetensors")
        config = make_config(infer_architecture(state), settings_from_yaml(self.folder / "config.json"))
        model = Mask2FormerForVideoSegmentation(config).eval()
        missing, unexpected = model.load_state_dict(convert_state_dict(state), strict=False)
        assert not unexpected and all("swin.layernorm" in name for name in missing)
        self.replay(model.criterion)
        return model


@pytest.fixture(scope="module", params=["video_r50_ytvis", "video_swin_ytvis"])
def golden(request):
    return GoldenClips(request.param)


@needs_golden
def test_logits_of_every_layer_and_features_of_every_frame(golden):
    with torch.no_grad():
        output = golden.model()(golden.pixel_values_videos, output_auxiliary_logits=True, output_hidden_states=True)
    maps = {
        "pixel_decoder.mask_features": output.pixel_decoder_last_hidden_state,
        **{f"backbone.res{i + 2}": x for i, x in enumerate(output.encoder_hidden_states)},
        **{f"pixel_decoder.multi_scale.{i}": x for i, x in enumerate(output.pixel_decoder_hidden_states)},
    }
    pairs = {name: x.flatten(0, 1) for name, x in maps.items()}
    pairs |= {"pred_logits": output.class_queries_logits, "pred_masks": output.masks_queries_logits}
    for layer, earlier in enumerate(output.auxiliary_logits):
        pairs[f"aux.{layer}.pred_logits"] = earlier["class_queries_logits"]
        pairs[f"aux.{layer}.pred_masks"] = earlier["masks_queries_logits"]
    assert set(golden.outputs) <= set(pairs)
    for name, theirs in golden.outputs.items():
        assert relative_difference(pairs[name], theirs) <= 1e-5, name


@needs_golden
def test_costs_assignments_losses_and_gradients_of_every_layer(golden, monkeypatch):
    seen, last = [], golden.num_layers - 1
    monkeypatch.setattr(
        "mask2former_hf.model.criterion.assign",
        lambda costs, *rest: seen.append((costs, assign(costs, *rest))) or seen[-1][1],
    )
    model = golden.model().train()
    output = model(golden.pixel_values_videos, mask_labels=golden.mask_labels, class_labels=golden.class_labels)
    assert output.masks_queries_logits is None
    costs = load_file(golden.folder / "loss_record.safetensors")
    ((ours, assigned),) = seen
    for clip, (queries, targets) in enumerate(assigned):
        for layer in range(golden.num_layers):
            name = f"{'final' if layer == last else f'aux{layer}'}.video{clip}"
            assert relative_difference(ours[clip][layer], costs[f"cost.{name}"]) <= 1e-5, name
            recorded = golden.record["assignments"][name]
            assert queries[layer].tolist() == recorded["query"] and targets[layer].tolist() == recorded["target"]
    for term, name in TERMS.items():
        for layer, value in enumerate(output.loss_dict[term].tolist()):
            assert value == pytest.approx(golden.record["weighted"][name + f"_{layer}" * (layer < last)], rel=1e-5)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    restored = restore_state_dict(revert_weight_conversion(model, gradients), frozen_batch_norm=True)
    norms = {name: x.norm().item() for name, x in restored.items() if x.is_floating_point()}
    assert norms == pytest.approx(golden.json("grad_norms.json"), rel=1e-4, abs=1e-4)


@needs_golden
def test_a_video_s_ten_best_objects_from_its_frames(golden):
    frames = load_file(golden.folder / "inference_inputs.safetensors")
    frames = [frames[f"frame{t}"].permute(1, 2, 0).numpy() for t in range(len(frames))]
    recorded = np.load(golden.folder / "inference_video.npz")
    raw = load_file(golden.folder / "inference_raw.safetensors")
    processor = Mask2FormerVideoProcessor(do_resize=False)
    inputs = processor(frames, return_tensors="pt")
    with torch.no_grad():
        output = golden.model()(**inputs)
    assert relative_difference(output.class_queries_logits, raw["pred_logits"]) <= 1e-5
    assert relative_difference(output.masks_queries_logits, raw["pred_masks"]) <= 1e-5
    output.class_queries_logits, output.masks_queries_logits = (
        raw["pred_logits"],
        raw["pred_masks"],
    )  # of equal last bits
    _, T, *size = recorded["mask_shape"].tolist()
    (found,) = processor.post_process_video_instance_segmentation(output, target_sizes=[size])
    pairs = zip(recorded["scores"], recorded["labels"], recorded["masks_packed"], strict=True)
    theirs = {
        (round(float(score), 4), int(label)): np.unpackbits(bits).reshape(T, *size) for score, label, bits in pairs
    }
    assert len(theirs) == len(found["scores"]) == 10
    for score, label, mask in zip(found["scores"], found["labels"], found["masks"], strict=True):
        assert np.array_equal(mask.numpy(), theirs[round(score.item(), 4), label.item()])


@needs_golden
@pytest.mark.parametrize("case", range(3))
def test_results_of_recorded_logits(case):
    folder = GOLDEN / "postprocess_synthetic"
    info, maps = json.loads((folder / "info.json").read_text())[case], np.load(folder / "maps.npz")
    tensors = {
        k.partition(".")[2]: x for k, x in load_file(folder / "tensors.safetensors").items() if k[0] == str(case)
    }
    sizes = (info["padded"], info["image"], info["output"])
    found = video_instance_segmentation(tensors["pred_logits"], tensors["video.pred_masks"], *sizes)
    scores, labels = tensors["video.scores"], tensors["video.labels"]
    order = scores.argsort(descending=True)
    torch.testing.assert_close(found["scores"], scores[order], rtol=1e-5, atol=0)
    shape = info["video_mask_shape"]
    masks = np.unpackbits(maps[f"{case}.video.masks_packed"], axis=1)[:, : np.prod(shape[1:])].reshape(shape)
    for score, label, mask in zip(scores, labels, masks, strict=True):
        same = (found["labels"] == label) & torch.isclose(found["scores"], score, rtol=1e-5, atol=0)
        assert (found["masks"][same] == torch.from_numpy(mask).bool()).flatten(1).all(1).any()


@needs_golden
def test_positions_of_pixels_in_frames():
    for file in ("position_embedding/pos.safetensors", "video_r50_ytvis/position_embedding_3d.safetensors"):
        golden = {k: x for k, x in load_file(GOLDEN / file).items() if k.startswith("3d.")}
        for name, theirs in golden.items():
            channels, (t, h, w) = theirs.shape[2], map(int, name.split(".")[-1].split("x"))
            module = torch.nn.Module()
            module.level_embed = torch.nn.Embedding(3, channels)
            module.__class__ = Mask2FormerVideoTransformerModule
            ours = module.positions(torch.zeros(1, t, 1, h, w))
            theirs = theirs[0].permute(0, 2, 3, 1).flatten(0, 2)
            torch.testing.assert_close(ours, theirs, atol=4e-6, rtol=0)


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_formulas_written_out():
    """With dense logits, loops, and points that are drawn here."""
    model = tiny_video_model(decoder_layers=2, train_num_points=40).requires_grad_(False)
    masks, labels = random_clips([3, 0, 2], 3, (64, 96))
    labels[2][1] = 5  # masks without a class
    generator, P, L = torch.Generator().manual_seed(3), 40, 2
    points = {
        "matching": torch.rand(3, P, 2, generator=generator),
        "candidates": torch.rand(3, L, 9, 3 * P, 2, generator=generator),
        "uniform": torch.rand(3, L, 9, P - 30, 2, generator=generator),
    }

    def draw_points(purpose, clip, layers, shape, device, generator):
        drawn = points[purpose][clip]
        return drawn.unsqueeze(0) if purpose == "matching" else drawn[layers, : shape[1]]

    model.criterion.draw_points = draw_points
    pixels = torch.randn(3, 3, 3, 64, 96)
    output = model(pixels, mask_labels=masks, class_labels=labels, output_auxiliary_logits=True)
    layers = [*output.auxiliary_logits, output]
    for layer, predicted in enumerate(layers):
        expected = naive_loss(
            predicted, masks, labels, {n: p if n == "matching" else p[:, layer] for n, p in points.items()}
        )
        for (name, ours), weight in zip(output.loss_dict.items(), (2, 5, 5), strict=True):
            assert ours[layer].item() / weight == pytest.approx(expected[name], rel=1e-4), (name, layer)


def naive_loss(predicted, masks, labels, points):
    from scipy.optimize import linear_sum_assignment

    def at(maps, where):  # (h, w) map, (P, 2) points
        return F.grid_sample(maps[None, None].float(), 2 * where[None, None] - 1, align_corners=False)[0, 0, 0]

    classes, all_masks = predicted["class_queries_logits"], predicted["masks_queries_logits"]
    wanted, bce, dice = torch.full(classes.shape[:2], 5), 0.0, 0.0
    for clip, (own, own_labels) in enumerate(zip(masks, labels, strict=True)):
        Q, N, T = classes.shape[1], *own.shape[:2]
        cost = np.zeros((Q, N))
        for q in range(Q):
            x = torch.cat([at(all_masks[clip, q, t], points["matching"][clip]) for t in range(T)])
            for n in range(N):
                y = torch.cat([at(own[n, t], points["matching"][clip]) for t in range(T)])
                overlap = 1 - (2 * (x.sigmoid() * y).sum() + 1) / (x.sigmoid().sum() + y.sum() + 1)
                entropy = F.binary_cross_entropy_with_logits(x, y)
                cost[q, n] = -2 * classes[clip, q].softmax(-1)[own_labels[n]] + 5 * entropy + 5 * overlap
        for m, (q, n) in enumerate(zip(*linear_sum_assignment(cost), strict=True)):
            wanted[clip, q] = own_labels[n]
            for t in range(T):
                row = m * T + t
                candidates = points["candidates"][clip, row]
                order = at(all_masks[clip, q, t], candidates).abs().argsort()
                where = torch.cat([candidates[order[:30]], points["uniform"][clip, row]])
                x, y = at(all_masks[clip, q, t], where), at(own[n, t], where)
                bce += F.binary_cross_entropy_with_logits(x, y).item()
                p = x.sigmoid()
                dice += (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)).item()
    weights = torch.tensor([1.0] * 5 + [0.1])
    entropy = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weights).item()
    count = sum(len(own) for own in labels)
    return {"loss_cross_entropy": entropy, "loss_mask": bce / count, "loss_dice": dice / count}


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage().nbytes() // value.element_size()  # an expanded one takes no memory
                self.elements = max(self.elements, min(value.numel(), storage))
        return result


def test_a_training_step_makes_no_mask_of_every_query_in_every_frame():
    Q, T, stride_4 = 400, 3, 32 * 32
    model = tiny_video_model(num_queries=Q, train_num_points=64, decoder_layers=2).train()
    masks, labels = random_clips([2], T, (128, 128))
    with LargestTensor() as largest:
        model(torch.randn(1, T, 3, 128, 128), mask_labels=masks, class_labels=labels).loss.backward()
    assert 0 < largest.elements < Q * T * stride_4


def test_more_objects_than_queries_and_clips_without_objects_train():
    model = tiny_video_model(num_queries=3).train()
    masks, labels = random_clips([5, 0], 2, (64, 64))
    output = model(torch.randn(2, 2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    output.loss.backward()
    assert output.loss.isfinite()
    empty, nothing = random_clips([0], 2, (64, 64))
    output = model(torch.randn(1, 2, 3, 64, 64), mask_labels=empty, class_labels=nothing)
    assert output.loss_dict["loss_mask"].sum() == 0 and output.loss_dict["loss_cross_entropy"].sum() > 0


# --- shapes, batches, files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_results_do_not_depend_on_other_clips_of_the_batch(backbone):
    model, sizes = tiny_video_model(backbone), [(50, 61), (33, 90)]
    videos = [np.random.default_rng(n).integers(0, 256, (3, *size, 3), np.uint8) for n, size in enumerate(sizes)]
    processor = Mask2FormerVideoProcessor(do_resize=False)
    with torch.no_grad():
        batch = model(**processor(videos, return_tensors="pt"))
        found = processor.post_process_video_instance_segmentation(batch)
        for clip, video in enumerate(videos):
            alone = model(**processor(video, return_tensors="pt"))
            assert relative_difference(batch.class_queries_logits[clip], alone.class_queries_logits[0]) <= 1e-5
            (expected,) = processor.post_process_video_instance_segmentation(alone)
            assert found[clip]["masks"].shape == (10, 3, *sizes[clip])
            assert (found[clip]["masks"] == expected["masks"]).float().mean() > 0.9999
            assert found[clip]["segments_info"][0]["score"] == found[clip]["scores"][0].item()


def test_a_video_checkpoint_is_also_a_model_of_single_frames(tmp_path):
    model = tiny_video_model("swin")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Mask2FormerForVideoSegmentation"]
    again, info = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    image, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    pixels = torch.randn(1, 2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).class_queries_logits, model(pixels).class_queries_logits)
        assert image.eval()(pixels[0]).class_queries_logits.shape == (2, 10, 6)
        frames = model(pixels).pixel_decoder_last_hidden_state
        torch.testing.assert_close(frames[0], image(pixels[0]).pixel_decoder_last_hidden_state)


def test_inputs_that_do_not_fit_are_named():
    model, pixels = tiny_video_model(), torch.randn(1, 2, 3, 64, 64)
    masks, labels = random_clips([2], 3, (64, 64))
    with pytest.raises(ValueError, match=r"mask_labels\[0\] has shape .* 2 frames of pixel_values_videos"):
        model(pixels, mask_labels=masks, class_labels=labels)
    with pytest.raises(ValueError, match=r"pixel_values_videos has shape .* \(batch, frames, 3, height, width\)"):
        model(pixels[0])
    with pytest.raises(ValueError, match=r"class_labels\[0\] contains \[6\].* or 5 for an object"):
        model(pixels, mask_labels=[masks[0][:, :2]], class_labels=[torch.tensor([0, 6])])
    with pytest.raises(ValueError, match="mask_labels without class_labels"):
        model(pixels, mask_labels=masks)


def test_a_query_may_be_several_objects_and_scores_have_no_mask_quality():
    logits, masks = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), torch.full((2, 3, 4, 4), -1.0)
    masks[0, 1] = 0.01
    found = video_instance_segmentation(logits, masks, (16, 16), top_k=2)
    assert found["queries"].tolist() == [0, 0] and found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], logits[0].softmax(-1)[:2])
    assert found["masks"].flatten(2).all(2).tolist() == [[False, True, False]] * 2


@needs_golden
def test_frames_are_resized_as_the_original_s_test_mapper_does(golden):
    raw, frames = np.load(golden.folder / "mapper.npz"), load_file(golden.folder / "inference_inputs.safetensors")
    processor = Mask2FormerVideoProcessor(size={"shortest_edge": 67, "longest_edge": 1333}, do_normalize=False)
    video = [raw["test.raw_frame0"], raw["test.raw_frame4"]]
    (ours,) = processor(video, do_rescale=False, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(ours[:, :, :67, :101], torch.stack([frames["frame0"], frames["frame4"]]).float())


def test_videos_that_do_not_fit_are_named(tmp_path):
    processor, frame = Mask2FormerVideoProcessor(size=32), np.zeros((32, 48, 3), np.uint8)
    assert processor([frame, frame])["pixel_values_videos"][0].shape == (2, 3, 32, 64)
    assert processor(np.stack([frame] * 3), return_tensors="np")["pixel_values_videos"].shape == (1, 3, 3, 32, 64)
    with pytest.raises(ValueError, match=r"videos have \[2, 1\] frames"):
        processor([[frame, frame], [frame]])
    with pytest.raises(ValueError, match=r"videos\[0\]\[1\] has another size than videos\[0\]\[0\]"):
        processor([frame, frame[:, :32]])
    with pytest.raises(ValueError, match=r"videos have \[0\] frames"):
        processor([])
    processor.save_pretrained(tmp_path)
    assert Mask2FormerVideoProcessor.from_pretrained(tmp_path).size["shortest_edge"] == 32
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path)(frame)["pixel_values"][0].shape == (3, 32, 64)
