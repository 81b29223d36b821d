"""Results on CPUs by blocks: where the mask logits leave no doubt who has all of a block, no pixel is computed.

A pixel is a blend of neighbouring cells of the mask logits, so inside a block a logit lies between the least and the
largest of the cells that the block is blended of. The other blocks are small products of matrices. Letters and sizes
are those of postprocessing.py; a result has R rows and C columns of blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .mask_resizing import source_rows

CELLS = 8  # along a side of a block: with more, bounds settle less; with fewer, the bounds of all blocks take longer
CONTEST_SIDES = (64, 128)  # pixels, at least and at most: a block with few queries takes 0.1 ms at any size
CLASSES_SIDES = (16, 64)  # one with all queries and undecided classes is a product worth avoiding
MARGIN = 1e-5  # relative: rounding may lift a blend of equal cells, and a sum, above them
EQUAL = 5e-7  # relative: claims of equal queries differ by less, as products of equal maps do not round alike
LARGEST = 1e30  # logit: infinite ones times a weight of 0 are no numbers


class Span(NamedTuple):
    """The rows, or the columns, of a block: a resize as products, first to the image and then to the result."""

    pixels: slice
    cells: slice  # that the pixels are blended of
    to_image: Tensor  # (used pixels of the image, cells)
    to_result: Tensor  # (pixels, used pixels of the image), of which there are at most two for a pixel
    whole: Tensor  # (pixels, cells)


class Blocks:
    """A result in blocks.

    Args:
        mask_logits: (Q, h, w).
        sizes: of the canvas, the image and the result.
        sides: least and largest side of a block in pixels.
    """

    def __init__(self, mask_logits: Tensor, sizes, sides: tuple[int, int]):
        self.logits = mask_logits.clamp(-LARGEST, LARGEST)
        self.rows, self.columns = (_spans(*side, *sides) for side in zip(mask_logits.shape[1:], *sizes, strict=True))
        rows, columns = (torch.tensor([len(span.whole) for span in side]) for side in (self.rows, self.columns))
        self.sides, self.areas = (rows, columns), rows[:, None] * columns  # pixels, (R, C)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(Q, R, C) twice: what mask probabilities in a block are at least, and at most."""
        least = torch.stack([self.logits[:, span.cells].amin(1) for span in self.rows], 1)  # (Q, R, w)
        least = torch.stack([least[:, :, span.cells].amin(2) for span in self.columns], 2)
        most = torch.stack([self.logits[:, span.cells].amax(1) for span in self.rows], 1)
        most = torch.stack([most[:, :, span.cells].amax(2) for span in self.columns], 2)
        least -= MARGIN * least.abs().clamp(min=1)
        most += MARGIN * most.abs().clamp(min=1)
        return least.sigmoid_(), most.sigmoid_()

    def painted(self, values: Tensor) -> Tensor:
        """(R, C) values, one for a block → (H, W), one for a pixel."""
        rows, columns = self.sides
        return values.repeat_interleave(columns, 1).repeat_interleave(rows, 0)

    def masks(self, row: int, column: int, queries: Tensor) -> Tensor:
        """(n, ., .) mask probabilities of queries at the pixels of a block."""
        rows, columns = self.rows[row], self.columns[column]
        cells = self.logits[queries, rows.cells, columns.cells]
        return resized(cells, rows.whole, columns.whole).sigmoid_()

    def class_scores(self, row: int, column: int, probabilities: Tensor, resize_masks_first: bool) -> Tensor:
        """(k, ., .) scores of classes, of which the queries have (k, Q) probabilities, at the pixels of a block."""
        rows, columns = self.rows[row], self.columns[column]
        cells = self.logits[:, rows.cells, columns.cells]
        steps = (rows.whole, columns.whole) if resize_masks_first else (rows.to_image, columns.to_image)
        masks = resized(cells, *steps).sigmoid_()
        scores = (probabilities @ masks.flatten(1)).unflatten(1, masks.shape[1:])
        return scores if resize_masks_first else resized(scores, rows.to_result, columns.to_result)

    def window(self, row: int, column: int) -> tuple[slice, slice]:
        """Rows and columns of the result that are a block."""
        return self.rows[row].pixels, self.columns[column].pixels


def resized(maps: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """(n, h, w) maps by the (H, h) weights of their rows and the (W, w) weights of their columns → (n, H, W)."""
    return torch.bmm(down.expand(len(maps), -1, -1), maps @ across.T)  # `down @` would transpose all maps, and back


def _spans(cells: int, canvas: int, image: int, target: int, least: int, most: int) -> list[Span]:
    side = min(max(CELLS * canvas * target // (cells * image), least), most)
    spans = []
    for start in range(0, target, side):
        stop = min(start + side, target)
        pixel, to_result = _weights(image, target, start, stop)
        cell, to_image = _weights(cells, canvas, pixel, pixel + to_result.shape[1])
        blended = to_result.any(0)  # a much smaller result takes few pixels of the image
        to_image, to_result = to_image[blended], to_result[:, blended]
        used = slice(cell, cell + to_image.shape[1])
        spans.append(Span(slice(start, stop), used, to_image, to_result, to_result @ to_image))
    return spans


def _weights(length: int, resized: int, start: int, stop: int) -> tuple[int, Tensor]:
    """The first input that the outputs [start, stop) of a resize need, and their (outputs, inputs) weights."""
    upper, lower, weight = source_rows(length, resized, start, stop)
    first, outputs, weight = int(upper[0]), torch.arange(stop - start), weight[:, 0]
    weights = torch.zeros(stop - start, int(lower[-1]) + 1 - first)
    weights[outputs, upper - first] = 1 - weight
    weights[outputs, lower - first] += weight  # at the edge the two are one
    return first, weights


class BlockContest(NamedTuple):
    """What a result needs of a `panoptic_rules.Contest`."""

    holder: Tensor  # (H, W) int32, number of the query that owns a pixel of its mask, from 1; 0 for nobody
    areas: Tensor
    owned: Tensor
    visible: Tensor


def contest_in_blocks(scores: Tensor, mask_logits: Tensor, sizes, mask_threshold: float) -> BlockContest:
    """`panoptic_rules.contest` of (N,) scores and (N, h, w) mask logits, at least one.

    Settled is a block in which one query alone can have the largest claim, and every mask is everywhere or nowhere.

    Args:
        sizes: of the canvas, the image and the result.
        mask_threshold: probability from which on a pixel belongs to a mask.
    """
    blocks = Blocks(mask_logits, sizes, CONTEST_SIDES)
    least, most = blocks.bounds()  # (N, R, C)
    everywhere = least >= mask_threshold
    partly = (most >= mask_threshold) & ~everywhere
    weights = scores[:, None, None]
    contend = most * weights >= (least * weights).amax(0) * (1 - MARGIN)
    settled = (contend.sum(0) == 1) & ~partly.any(0)  # (R, C)
    computed = (contend | partly) & ~settled
    owner = contend.int().argmax(0)
    shown = everywhere.gather(0, owner[None])[0] & settled

    holder = blocks.painted(((owner + 1) * shown).int())
    areas = ((everywhere & ~computed) * blocks.areas).sum((1, 2))  # (N,)
    owned, visible = (torch.zeros_like(areas).index_add_(0, owner[b], blocks.areas[b]) for b in (settled, shown))
    for row, column in (~settled).nonzero().tolist():
        queries = computed[:, row, column].nonzero()[:, 0]  # (n,)
        masks = blocks.masks(row, column, queries)
        hits = masks >= mask_threshold
        winner = _first_of_largest(masks.mul_(weights[queries]))
        inside = hits.gather(0, winner[None])[0]
        counts = (2 * winner + inside).flatten().bincount(minlength=2 * len(queries)).view(-1, 2)
        areas[queries] += hits.sum((1, 2))
        owned[queries] += counts.sum(1)
        visible[queries] += counts[:, 1]
        holder[blocks.window(row, column)] = ((queries + 1)[winner] * inside).int()
    return BlockContest(holder, *(torch.cat([x.new_zeros(1), x]) for x in (areas, owned, visible)))


def _first_of_largest(claims: Tensor) -> Tensor:
    """(n, ., .) claims → (., .) the number of the first that is the largest, or as good as equal to it."""
    ranks = torch.arange(len(claims), 0, -1, dtype=torch.int32)[:, None, None]
    largest = claims >= claims.amax(0) * (1 - EQUAL)
    return len(claims) - (ranks * largest).amax(0).long()


def classes_in_blocks(probabilities: Tensor, mask_logits: Tensor, sizes, resize_masks_first: bool) -> Tensor:
    """The class with the best score at every pixel, (H, W) int64; see `postprocessing.semantic_scores`.

    Args:
        probabilities: (K, Q) of the queries' classes.
        mask_logits: (Q, h, w).
        sizes: of the canvas, the image and the result.
    """
    blocks = Blocks(mask_logits, sizes, CLASSES_SIDES)
    least, most = (torch.tensordot(probabilities, bound, 1) for bound in blocks.bounds())  # (K, R, C)
    surest, winner = least.max(0)
    candidates = most >= surest * (1 - MARGIN)
    classes = blocks.painted(winner)
    for row, column in (candidates.sum(0) > 1).nonzero().tolist():
        few = candidates[:, row, column].nonzero()[:, 0]
        scores = blocks.class_scores(row, column, probabilities[few], resize_masks_first)
        classes[blocks.window(row, column)] = few[scores.max(0).indices]
    return classes
