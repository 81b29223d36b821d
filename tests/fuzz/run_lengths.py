"""Target: run lengths of foreign annotation files, `read_counts` and `to_rle`.

Whatever a file's JSON can say gives a ValueError or runs that fill the mask; another exception, a crash and memory
beyond the file's size are findings. Accepted ones are decoded by the COCO package and compared.
"""

import json
import random
import time
from pathlib import Path

import numpy as np

from mask2former_hf.data.rle import coco_tools, encode_masks, read_counts, to_rle

MOST_PIXELS = 10**6  # masks larger than that are not decoded here
NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300, float("nan"))
OTHERS = (None, True, "", "0", b"", [], {}, [[]], [None], ["1"], [[1, 2]])


def sound(choose: random.Random) -> dict:
    height, width = choose.randint(1, 12), choose.randint(1, 12)
    mask = np.array([choose.random() < 0.4 for _ in range(height * width)]).reshape(height, width)
    rle = encode_masks(mask[None])[0]
    form = choose.randrange(3)
    counts = (rle["counts"], rle["counts"].decode(), [int(run) for run in read_counts(rle, "sound")])[form]
    return {"size": [height, width], "counts": counts}


def mutated(rle: dict, choose: random.Random) -> dict:
    for _ in range(choose.choice((1, 1, 2, 3))):
        key = choose.choice(("counts", "counts", "counts", "size"))
        value = rle[key]
        if choose.random() < 0.05:
            rle[key] = choose.choice((*OTHERS, *NUMBERS))
        elif isinstance(value, list):
            value = list(value)
            index = choose.randrange(len(value) + 1)
            new = choose.choice((*NUMBERS, *range(9), choose.choice(OTHERS)))
            value[index : index + choose.randrange(2)] = [new] * choose.choice((0, 1, 1, 1, 2))
            rle[key] = value
        elif isinstance(value, bytes | str):
            text = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            index = choose.randrange(len(text) + 1)
            new = choose.choice(
                (choose.randbytes(2), b"o" * choose.choice((1, 13, 100)), bytes([choose.randint(48, 111)]))
            )
            text = text[:index] + new * choose.randrange(2) + text[index + choose.randrange(3) :]
            rle[key] = text if isinstance(value, bytes) else text.decode("latin1")
    return rle


def check(seed: int) -> bool:
    """Whether the run lengths of this number were accepted."""
    choose = random.Random(seed)
    rle = mutated(sound(choose), choose)
    try:
        runs = read_counts(dict(rle), "fuzz")
    except ValueError:
        runs = None
    try:
        compressed = to_rle(dict(rle))
    except ValueError:
        compressed = None
    if runs is None:
        assert compressed is None, f"to_rle accepts what read_counts refuses: {rle}"
        return False
    height, width = (int(side) for side in rle["size"])
    assert (runs >= 0).all() and runs.sum() == height * width
    if height * width <= MOST_PIXELS and compressed is not None:
        expected = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        assert np.array_equal(coco_tools().mask.decode(compressed), expected)
    return True


def run(seed: int, count: int | None, until: float, folder: Path) -> str:
    """`count` mutated run lengths, or up to the time `until`.

    Raises:
        AssertionError: with what is needed to repeat the case.
    """
    tried = accepted = 0
    while tried != count and time.monotonic() < until:
        case = seed * 10**8 + tried
        (folder / "run_lengths_case").write_text(json.dumps(f"run_lengths.check({case})"))
        try:
            accepted += check(case)
        except Exception as error:
            raise AssertionError(f"run_lengths.check({case}): {error!r}") from error
        tried += 1
    return f"run_lengths: {tried} mutated, {accepted} equal to the COCO package's masks, {tried - accepted} refused"
