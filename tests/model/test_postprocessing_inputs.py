"""What post-processing is given: every argument with every wrong value works or is refused by name."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from wrong_values import assert_names, every_wrong_value

from mask2former_hf.model import postprocessing
from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor
from mask2former_hf.model.video_postprocessing import video_instance_segmentation

LOGITS = {"class_logits": torch.randn(3, 4), "mask_logits": torch.randn(3, 2, 2), "canvas_size": (8, 8)}
MASKS = torch.rand(3, 4, 5) > 0.5
SWITCHES = {"decide", "resize_masks_first", "return_segmentation_scores", "return_coco_annotation"}
SWITCHES |= {"return_binary_maps"}
FUNCTIONS = {
    "semantic_scores": LOGITS,
    "semantic_map": LOGITS,
    "panoptic_segmentation": LOGITS,
    "panoptic_claims": LOGITS,
    "instance_segmentation": LOGITS,
    "stack_instances": {"masks": MASKS},
    "masks_to_boxes": {"masks": MASKS},
}
METHODS = [f"post_process_{task}_segmentation" for task in ("semantic", "instance", "panoptic")]


def outputs(**changes):
    fields = {
        "class_queries_logits": torch.randn(2, 3, 4),
        "masks_queries_logits": torch.randn(2, 3, 2, 2),
        "image_sizes": torch.tensor([[8, 8], [8, 6]]),
        "canvas_sizes": torch.tensor([[8, 8], [8, 8]]),
        "mask_strides": torch.tensor([4, 4]),
    }
    return SimpleNamespace(**fields | changes)


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name not in SWITCHES | {"self"}]


ROWS = [(name, argument) for name in FUNCTIONS for argument in arguments(getattr(postprocessing, name))]
ROWS += [(name, argument) for name in METHODS for argument in arguments(getattr(Mask2FormerImageProcessor, name))]


def function_of(name):
    return getattr(postprocessing if name in FUNCTIONS else Mask2FormerImageProcessor(), name)


@every_wrong_value
@pytest.mark.parametrize("name, argument", ROWS)
def test_every_argument_with_every_wrong_value_works_or_is_refused_by_name(name, argument, value):
    given = FUNCTIONS.get(name) or {"outputs": outputs()}
    try:
        result = function_of(name)(**given | {argument: value})
    except (ValueError, TypeError) as error:
        assert_names(error, argument)
        return
    assert len(result) > 0
    if "threshold" in argument and value is not None:  # None: the processor's, of panoptic results
        assert 0 <= value <= 1 and value is not True


@every_wrong_value
@pytest.mark.parametrize("field", vars(outputs()))
@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_the_outputs_works_or_is_refused_by_name(name, field, value):
    try:
        results = function_of(name)(outputs(**{field: value}))
    except (ValueError, TypeError) as error:
        assert_names(error, field)
        return
    assert len(results) == 2 and value is None


NAN, INF = float("nan"), float("inf")
ON_LOGITS = [name for name, given in FUNCTIONS.items() if given is LOGITS]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*ON_LOGITS, "video_instance_segmentation"])
def test_logits_that_are_no_numbers_or_infinite_are_refused_at_every_door(name, dtype, value):
    function = getattr(postprocessing, name, video_instance_segmentation)
    of_clip = function is video_instance_segmentation
    classes, masks = torch.zeros(3, 4, dtype=dtype), torch.zeros(3, *[2] * of_clip, 2, 2, dtype=dtype)
    function(classes, masks, (8, 8))
    some, every = masks.clone(), classes.clone()
    some[1, 0, 0], every[1] = value, value
    with pytest.raises(ValueError, match="mask_logits has values that are not numbers, or are infinite"):
        function(classes, some, (8, 8))
    with pytest.raises(ValueError, match="class_logits has values that are not numbers, or are infinite"):
        function(every, masks, (8, 8))


def test_a_class_of_which_the_logits_say_that_it_cannot_be_is_not_found():
    given = LOGITS | {"class_logits": torch.tensor([[9.0, 1.0, -INF, 0.0]] * 3), "mask_logits": torch.ones(3, 2, 2)}
    without_best = given | {"class_logits": torch.tensor([[-INF, 1.0, -INF, 0.0]] * 3)}
    assert set(postprocessing.semantic_map(**given).unique().tolist()) == {0}
    assert set(postprocessing.semantic_map(**without_best).unique().tolist()) == {1}
    _, segments = postprocessing.panoptic_segmentation(**without_best, object_mask_threshold=0.5)
    assert {segment["label_id"] for segment in segments} == {1}


@pytest.mark.parametrize("name", METHODS)
def test_numpy_arrays_are_taken_as_tensors(name):
    torch.manual_seed(0)
    given = outputs()
    arrays = SimpleNamespace(**{field: value.numpy() for field, value in vars(given).items()})
    for ours, same in zip(function_of(name)(given), function_of(name)(arrays), strict=True):
        maps = [result["segmentation"] if isinstance(result, dict) else result for result in (ours, same)]
        assert torch.equal(*maps)


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"masks_queries_logits": torch.zeros(3, 3, 2, 2)}, "masks_queries_logits has 3 entries for 2 images"),
        ({"image_sizes": torch.tensor([[8, 8]])}, "image_sizes has 1 entries for 2 images"),
        ({"mask_strides": torch.tensor([4])}, "mask_strides has 1 entries for 2 images"),
        ({"class_queries_logits": np.zeros((2, 3))}, r"class_queries_logits has shape \(2, 3\); .* 3 dimensions"),
        ({"class_queries_logits": [[1.0]]}, "class_queries_logits is a list; it must be a tensor or a NumPy array"),
        ({"class_queries_logits": np.array(["a"])}, "class_queries_logits is a ndarray; .* of numbers"),
        ({"image_sizes": torch.tensor([[9, 8], [8, 8]])}, r"image_size=\(9, 8\) must fit into canvas_size"),
    ],
)
def test_outputs_that_do_not_belong_together_are_refused(changes, rule):
    with pytest.raises((ValueError, TypeError), match=rule):
        Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs(**changes))


def test_a_tuple_of_the_model_is_refused_with_the_repair():
    with pytest.raises(TypeError, match="outputs is a tuple without .* return_dict=True"):
        Mask2FormerImageProcessor().post_process_panoptic_segmentation((torch.zeros(1), torch.zeros(1)))


@pytest.mark.parametrize("size", [(4.5, 4), (4, float("nan")), ("a", "b"), (4, 4, 4), (10**7, 4), (-4, 4), [[4], [4]]])
def test_target_sizes_are_whole_numbers_of_pixels(size):
    with pytest.raises(ValueError, match="target_size=.* must be two positive numbers"):
        Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs(), target_sizes=[size, size])
