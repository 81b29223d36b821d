"""Results by blocks, against the same rules at every pixel."""

import pytest
import torch

from mask2former_hf.model import postprocessing, result_blocks
from mask2former_hf.model.mask_resizing import query_chunks, resize_mask_logits
from mask2former_hf.model.panoptic_rules import contest
from mask2former_hf.model.postprocessing import panoptic_segmentation, semantic_map, semantic_scores
from mask2former_hf.model.result_blocks import Blocks, classes_in_blocks, contest_in_blocks

SIZES = [  # canvas, image, result
    ((96, 128), (96, 128), (96, 128)),
    ((96, 128), (75, 128), (301, 203)),
    ((96, 128), (93, 57), (40, 31)),
    ((24, 32), (20, 32), (200, 90)),
]


@pytest.fixture(params=SIZES, ids=lambda sizes: "x".join(map(str, sizes[2])))
def sizes(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that one small result has blocks of every kind."""
    monkeypatch.setattr(result_blocks, "CELLS", 2)
    monkeypatch.setattr(result_blocks, "CONTEST_SIDES", (5, 16))
    monkeypatch.setattr(result_blocks, "CLASSES_SIDES", (5, 16))


@pytest.fixture
def computed(monkeypatch):
    """Numbers of pixels of blocks that were computed."""
    pixels, window = [], Blocks.window

    def counting(*arguments):
        rows, columns = window(*arguments)
        pixels.append((rows.stop - rows.start) * (columns.stop - columns.start))
        return rows, columns

    monkeypatch.setattr(Blocks, "window", counting)
    return pixels


def discs(queries=7, size=(24, 32), sharpness=1.5, seed=0):
    """Mask logits (Q, h, w), discs with clear edges; the last two are one disc, and the first is nowhere."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(queries, 1, 1, 2, generator=generator) * torch.tensor(size)
    radii = 3 + 6 * torch.rand(queries, 1, 1, generator=generator)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1)
    logits = sharpness * (radii - (grid - centres).norm(dim=-1))
    logits[0], logits[-1] = -9, logits[-2]
    return logits


def assert_same(found, expected):
    """But for pixels in which two claims are equal up to rounding."""
    assert found.shape == expected.shape
    assert (found != expected).float().mean() <= 1e-4


@pytest.mark.parametrize("threshold", [0.5, 0.02, 0.98])
def test_queries_share_the_blocks_as_they_share_the_pixels(sizes, threshold, computed):
    logits, scores = discs(), torch.tensor([0.99, 0.9, 0.3, 0.8, 0.7, 0.85, 0.85])
    found = contest_in_blocks(scores, logits, sizes, threshold)
    expected = contest(scores, query_chunks(logits, *sizes), sizes[2], lambda masks: masks >= threshold)
    assert_same(found.holder, expected.holder)
    for name in ("areas", "owned", "visible"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4 * expected.owner.numel()
    assert found.owned.sum() == expected.owner.numel()
    assert 0 < sum(computed) < expected.owner.numel()


@pytest.mark.parametrize("resize_masks_first", [True, False])
def test_the_best_class_is_that_of_all_scores(sizes, resize_masks_first, computed):
    logits, generator = discs(), torch.Generator().manual_seed(1)
    logits[0] = 2  # something is everywhere
    class_logits = 5 * torch.randn(len(logits), 6, generator=generator)
    found = semantic_map(class_logits, logits, *sizes, resize_masks_first=resize_masks_first)
    scores = semantic_scores(class_logits, logits, *sizes, resize_masks_first=resize_masks_first)
    assert_same(found, scores.argmax(0))
    assert len(found.unique()) > 1 and found.dtype == torch.int64
    assert 0 < sum(computed) < found.numel()


def test_a_much_smaller_result_takes_no_more_of_the_image_than_it_is_blended_of():
    logits, sizes = discs(), ((1024, 768), (1000, 760), (31, 24))
    class_logits = 5 * torch.randn(len(logits), 6, generator=torch.Generator().manual_seed(1))
    found = semantic_map(class_logits, logits, *sizes, resize_masks_first=False)
    assert torch.equal(found, semantic_scores(class_logits, logits, *sizes, resize_masks_first=False).argmax(0))
    blocks = Blocks(logits, sizes, result_blocks.CLASSES_SIDES)
    for span in (*blocks.rows, *blocks.columns):
        assert len(span.to_image) <= 2 * (span.pixels.stop - span.pixels.start)


def test_a_block_without_doubt_is_not_computed(computed):
    """Two halves of an image, whose edge is in one column of blocks."""
    logits = torch.full((2, 40, 40), -8.0)
    logits[0, :, :20], logits[1, :, 20:] = 8, 8
    class_logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    sizes = (160, 160), (160, 160), (160, 160)
    ids, segments = panoptic_segmentation(class_logits, logits, *sizes)
    assert [s["area"] for s in segments] == [160 * 80, 160 * 80]
    assert ids[:, :80].eq(1).all() and ids[:, 80:].eq(2).all()
    assert sum(computed) <= 160 * 16
    computed.clear()
    assert torch.equal(semantic_map(class_logits, logits, *sizes), ids.long() - 1)
    assert sum(computed) <= 160 * 16


def test_bounds_hold_at_every_pixel(sizes):
    """Of noise as well, and of equal cells, whose blends are rounded."""
    logits = 20 * torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(0))
    logits[1], logits[2] = -13.7, 0.1
    blocks = Blocks(logits, sizes, (5, 16))
    least, most = map(blocks.painted, (bound.permute(1, 2, 0) for bound in blocks.bounds()))
    masks = resize_mask_logits(logits, *sizes).sigmoid().permute(1, 2, 0)
    assert (least <= masks).all() and (masks <= most).all()


def test_infinite_logits_are_certain(sizes):
    logits = discs()[:3]
    logits[0], logits[2] = float("inf"), -float("inf")
    assert contest_in_blocks(torch.tensor([0.5, 0.9, 0.9]), logits[[2, 0, 0]], sizes, 0.5).holder.eq(2).all()
    assert classes_in_blocks(torch.eye(3), logits, sizes, True).eq(0).all()


def test_masks_with_thresholds_of_their_own_are_looked_at_whole(monkeypatch):
    monkeypatch.setattr(postprocessing, "contest_in_blocks", None)
    seen = set()

    def decide(masks):
        seen.add(masks.shape[1:])
        return masks > 0.5

    panoptic_segmentation(torch.eye(7, 9) * 9, discs(), (96, 128), (96, 128), (48, 64), decide=decide)
    assert seen == {(48, 64)}
