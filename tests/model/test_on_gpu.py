"""The whole model on a GPU: the CPU's values, no waiting for the device, graphs, half precision, several processes.

Skipped without a GPU. With MASK2FORMER_HF_TEST_DEVICE=cpu what needs no GPU itself runs on the CPU, so that these
tests are not untried where there is none.
"""

import copy
import os
import warnings

import numpy as np
import pytest
import torch
from helpers import GoldenCase, needs_golden, padded_batch, random_targets, relative_difference, tiny_model
from torch import nn

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.training.activations import choose, compute_again, measure

DEVICE = os.environ.get("MASK2FORMER_HF_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
if DEVICE is None:
    pytest.skip("no GPU (MASK2FORMER_HF_TEST_DEVICE=cpu runs part of these tests on the CPU)", allow_module_level=True)
OUTPUTS = ("class_queries_logits", "masks_queries_logits")
SIZES = [(64, 96), (50, 80)]


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions of float32 as such: by default cuDNN rounds their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on(device, value):
    return [x.to(device) for x in value] if isinstance(value, list) else value.to(device)


def fixed_points(criterion):
    """The same random points on every device."""

    def draw_points(purpose, image, layers, shape, device, generator):
        numbers = torch.Generator().manual_seed(hash((purpose == "matching", image, layers.start)) % 2**31)
        return torch.rand(shape, generator=numbers).to(device)

    criterion.draw_points = draw_points


def training_inputs(counts=(3, 2), size=(64, 96)):
    masks, labels = random_targets(counts, size)
    pixels = torch.randn(len(counts), 3, *size, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "mask_labels": masks, "class_labels": labels}


@pytest.mark.parametrize("backbone", ["swin", "resnet", "convnext"])
def test_a_padded_batch_gives_the_cpus_values(backbone):
    model = tiny_model(backbone)
    pixels, mask = padded_batch(SIZES)
    with torch.inference_mode():
        expected = model(pixels, pixel_mask=mask)
        found = model.to(DEVICE)(pixels.to(DEVICE), pixel_mask=mask.to(DEVICE))
    for name in OUTPUTS:
        assert relative_difference(found[name].cpu(), expected[name]) < 1e-4
    assert found.image_sizes.tolist() == [list(size) for size in SIZES]


@needs_golden
@pytest.mark.parametrize("name", ["swin_coco_panoptic", "r50_coco_panoptic"])
def test_the_originals_values(name, tmp_path):
    case = GoldenCase(name)
    model = case.model(tmp_path).to(DEVICE)
    case.replay(model.criterion)
    draw = model.criterion.draw_points
    model.criterion.draw_points = lambda *arguments: draw(*arguments).to(DEVICE)
    with torch.no_grad():
        output = model(
            case.pixel_values.to(DEVICE),
            pixel_mask=case.pixel_mask.to(DEVICE),
            mask_labels=on(DEVICE, case.mask_labels),
            class_labels=on(DEVICE, case.class_labels),
        )
    weighted, last = case.json("losses.json")["weighted"], case.num_layers - 1
    for ours, theirs in (("loss_cross_entropy", "loss_ce"), ("loss_mask", "loss_mask"), ("loss_dice", "loss_dice")):
        for layer in range(case.num_layers):
            name = theirs if layer == last else f"{theirs}_{layer}"
            assert output.loss_dict[ours][layer].item() == pytest.approx(weighted[name], rel=1e-3)


def test_loss_and_gradients_are_the_cpus():
    model, inputs = tiny_model().train(), training_inputs()
    fixed_points(model.criterion)
    loss = model(**inputs).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.to(DEVICE)
    found = model(**{name: on(DEVICE, value) for name, value in inputs.items()}).loss
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-4)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name].cpu() - gradient).abs().max() < 2e-3 * largest, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_in_half_precision_is_finite_and_near(dtype):
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("about GPUs: float16 on CPUs has no scaled training")
    model = tiny_model("resnet").train().to(DEVICE)
    fixed_points(model.criterion)
    inputs = {name: on(DEVICE, value) for name, value in training_inputs().items()}
    exact = model(**inputs).loss
    with torch.autocast(DEVICE, dtype=dtype):
        loss = model(**inputs).loss
    (loss * (64 if dtype == torch.float16 else 1)).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@needs_gpu
@pytest.mark.parametrize("backbone", ["swin", "resnet", "convnext"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole tensor", "pixel mask on the host"])
def test_inference_never_waits_for_the_device(backbone, masked):
    model = tiny_model(backbone).to(DEVICE)
    pixels, mask = padded_batch(SIZES)
    pixels, options = pixels.to(DEVICE), {"pixel_mask": mask} if masked else {}
    with torch.inference_mode():
        model(pixels, **options)  # compiles and tunes
        assert waits(lambda: model(pixels, **options)) == []


@needs_gpu
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_a_training_step_waits_once_for_the_matching_costs(backbone):
    model = tiny_model(backbone).train().to(DEVICE)
    inputs = {name: on(DEVICE, value) for name, value in training_inputs().items()}

    def step():
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    step()
    found = waits(step)
    assert len(found) == 1 and "matcher.py" in found[0], found


def waits(function) -> list[str]:
    """Where the host waited for the device: file and line of each time."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return [f"{x.filename}:{x.lineno}" for x in found if "called a synchronizing" in str(x.message)]


@needs_gpu
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_inference_can_be_captured_in_a_graph(backbone):
    model = tiny_model(backbone).to(DEVICE)
    pixels, _ = padded_batch([(64, 96)] * 2)
    static = pixels.to(DEVICE)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)
        static.copy_(pixels.flip(-1))
        graph.replay()
        expected = model(pixels.flip(-1).to(DEVICE))
    for name in OUTPUTS:
        assert relative_difference(output[name], expected[name]) < 1e-5
    assert output.image_sizes.tolist() == [[64, 96]] * 2


@needs_gpu
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_compiled_model_gives_the_same(training):
    model = tiny_model("resnet").to(DEVICE).train(training)
    fixed_points(model.criterion)
    inputs = {name: on(DEVICE, value) for name, value in training_inputs().items()}
    inputs = inputs if training else {"pixel_values": inputs["pixel_values"]}
    compiled = torch.compile(copy.deepcopy(model))
    fixed_points(compiled.criterion)
    with torch.set_grad_enabled(training):
        expected, found = model(**inputs), compiled(**inputs)
    if training:
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
        found.loss.backward()
    else:
        assert relative_difference(found.masks_queries_logits, expected.masks_queries_logits) < 1e-4


@needs_gpu
def test_deterministic_training_repeats_itself():
    inputs = {name: on(DEVICE, value) for name, value in training_inputs().items()}
    torch.use_deterministic_algorithms(True, warn_only=True)  # grid_sample's own backward has no fixed order
    try:
        gradients = []
        for _ in range(2):
            model = tiny_model().train().to(DEVICE)
            fixed_points(model.criterion)
            value = model.model.pixel_level_module.decoder.encoder.layers[-1].self_attn.value_proj.weight
            model(**inputs).loss.backward()
            gradients.append(value.grad.clone())
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_difference(gradients[1], gradients[0]) < 1e-4


@needs_gpu
def test_data_parallel_training_of_one_process(tmp_path):
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        model = tiny_model().train().to(DEVICE)
        fixed_points(model.criterion)
        inputs = {name: on(DEVICE, value) for name, value in training_inputs().items()}
        expected = model(**inputs).loss.item()
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        loss = wrapped(**inputs).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_results_are_the_cpus(task):
    model, processor = tiny_model("resnet"), Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    numbers = {} if task == "semantic" else {"threshold": 0.3}
    expected = Segmenter.of(model, processor, task=task)(image, **numbers)
    found = Segmenter.of(model.to(DEVICE), processor, task=task)(image, **numbers)
    if task == "semantic":
        assert (found.map == expected.map).mean() > 0.999
    assert [s.label_id for s in found.segments] == [s.label_id for s in expected.segments]
    for ours, theirs in zip(found.segments, expected.segments, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-3)


@needs_gpu
@pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext"])
def test_a_checkpoint_is_replayed_with_equal_results(backbone, tmp_path):
    model, processor = tiny_model(backbone), Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (6, 70, 90, 3), dtype=np.uint8)
    images = [*images, *images[:, :69, :80]]  # of the same canvas, and another size
    expected = [result.map for result in Segmenter.of(model, processor, task="semantic")(images)]
    segmenter = Segmenter(tmp_path, task="semantic", dtype=torch.float32)
    found = [result.map for result in segmenter(images)]
    assert segmenter._replay._graphs  # some were
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours == theirs).mean() > 0.999
    segmenter.model.double()  # moves the weights
    assert (segmenter(images[0]).map == expected[0]).mean() > 0.999


@needs_gpu
@pytest.mark.parametrize("effort", [0.4, 0.8])
def test_less_effort_gives_the_cpus_results(effort, tmp_path):
    model, processor = tiny_model("swin"), Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    found, expected = (
        Segmenter(tmp_path, task="semantic", device=device, dtype=torch.float32, effort=effort)
        for device in (DEVICE, "cpu")
    )
    for _ in range(4):  # the last ones are replayed
        assert (found(image).map == expected(image).map).mean() > 0.999


@needs_gpu
def test_blocks_computed_again_give_the_same_gradients_in_less_memory():
    model = tiny_model("swin").train().to(DEVICE)
    fixed_points(model.criterion)
    inputs = {name: on(DEVICE, value) for name, value in training_inputs(size=(256, 256)).items()}

    def step():
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs).loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return gradients, torch.cuda.max_memory_allocated() - before

    step()  # compiles and tunes
    expected, most = step()
    measured = measure(model, inputs, None)
    compute_again(model, choose(measured, 0.6 * measured.peak(frozenset())).again)
    found, peak = step()
    assert peak < 0.9 * most
    largest = max(gradient.abs().max() for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-3 * largest


@needs_gpu
def test_swins_windows_are_attended_to_where_they_are():
    """Whether the kernel ran: nothing else would tell."""
    model, pixels = tiny_model("swin").to(DEVICE), torch.randn(1, 3, 64, 96, device=DEVICE)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(pixels)
    assert any("window_attention" in event.key for event in profiler.key_averages())
