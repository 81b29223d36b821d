"""What counts for nothing is counted, what is probably a mistake is said, and nothing to learn is refused."""

import re

import numpy as np
import pytest

from mask2former_hf.data.classes import BACKGROUND_ID, ClassTable
from mask2former_hf.data.example import Example
from mask2former_hf.data.statistics import look_through

H, W = 8, 10


class Data(list):
    """A list of examples with classes."""

    left_out = 0

    def __init__(self, examples, labels=("cell", "gland")):
        super().__init__(examples)
        self.classes = ClassTable.from_labels(dict(enumerate(labels, 1)), things=labels)


def example(fill, *boxes):
    """A map of `fill` with boxes (rows, category, iscrowd) as the segments 1, 2, ..."""
    ids, segments = np.full((H, W), fill, dtype=np.int32), []
    for number, (rows, category, iscrowd) in enumerate(boxes, 1):
        ids[rows] = number
        segments.append({"id": number, "category_id": category, "iscrowd": iscrowd})
    return Example(None, ids, segments)


NOTHING = slice(0, 0)


def test_objects_crowds_empty_ones_and_images_without_are_counted():
    data = Data(
        [
            example(BACKGROUND_ID, (slice(0, 2), 0, 0), (NOTHING, 1, 0), (slice(4, 5), 1, 1)),
            example(BACKGROUND_ID),
            example(0),
        ]
    )
    data.left_out = 4
    found = look_through(data)
    assert (found.examples, found.objects, found.most, found.mean) == (3, 2, 2, 2 / 3)
    assert found.pixels == (20, 0) and (found.void, found.background) == (80, 130)
    assert found.lines() == [
        "1 of 3 objects have no pixel: there is nothing to learn from them",
        "1 of 3 objects are crowds (iscrowd is 1), which are ignored",
        "2 of 3 images have no object; they are used",
        "4 of 7 images have no object and are not used",
        "1 of 3 images are ignored in every pixel",
    ]
    found.check()


def test_good_data_give_no_lines_and_no_warnings():
    found = look_through(Data([example(BACKGROUND_ID, (slice(0, 2), 0, 0), (slice(3, 4), 1, 0))] * 3))
    assert found.lines() == found.warnings() == []


@pytest.mark.parametrize(
    "examples, labels, reason",
    [
        ([example(BACKGROUND_ID, (slice(0, 2), 0, 1))] * 2, ("a", "b"), "2 of 2 objects are crowds .* with a brush"),
        ([example(0, (slice(0, 6), 0, 0))], ("lesion",), "every pixel that counts is 'lesion', so that any model"),
        ([example(0, (slice(0, 2), 0, 0), (slice(2, 3), 1, 0))], ("a", "b"), "62% of the pixels are ignored"),
        ([example(-1, (slice(0, 2), 1, 0))], "abcdef", "5 of 6 classes do not occur, such as a, c, d, e, f"),
    ],
)
def test_probable_mistakes_are_said_with_their_reason(examples, labels, reason):
    (warning,) = look_through(Data(examples, labels)).warnings()
    assert re.search(reason, warning)


@pytest.mark.parametrize(
    "examples, reason",
    [
        ([example(BACKGROUND_ID, (slice(0, 2), 0, 1))], "1 examples looked at: 1 of 1 objects are crowds"),
        ([example(BACKGROUND_ID, (NOTHING, 0, 0))] * 2, "2 of 2 objects have no pixel"),
        ([example(BACKGROUND_ID)] * 2, "2 of 2 images have no object"),
        ([example(0)], "1 of 1 images are ignored in every pixel"),
    ],
)
def test_data_with_nothing_to_learn_are_refused_with_the_reason(examples, reason):
    with pytest.raises(ValueError, match=f"nothing to learn in the .*{reason}"):
        look_through(Data(examples)).check()


def test_examples_are_spread_over_the_data_and_streams_are_read_from_their_start():
    data = Data([example(BACKGROUND_ID, (slice(0, 1 + n), 0, 0)) for n in range(6)])
    seen = []
    found = look_through(data, most=2, progress=lambda numbers: [seen.append(n) or n for n in numbers])
    assert seen == [0, 3] and found.pixels == (W * (1 + 4), 0)

    class Stream:
        classes = data.classes

        def __iter__(self):
            return iter(data)

    assert look_through(Stream(), most=2).pixels == (W * (1 + 2), 0)


def test_a_category_beyond_the_classes_is_named():
    with pytest.raises(ValueError, match="category_id 7 is no index of the 2 classes"):
        look_through(Data([example(0, (slice(0, 1), 7, 0))]))
