"""Target: readers of annotation files, on files of every format with several damaged fields or bytes.

Whatever a file says gives examples, or one line that names it; another exception, a longer text, a read that takes
longer than MOST_SECONDS and memory beyond MOST_MEMORY are findings.
"""

import copy
import logging
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from annotation_files import FILES, HOSTILE, make_folder, problem, write
from wrong_values import changed, places

MOST_SECONDS = 5
MOST_MEMORY = 200 * 2**20  # above that of all files before; the files have a few kB


def damaged(content, choose: random.Random):
    """One to three fields with other values, copies or moved parts; sometimes without them."""
    for _ in range(choose.choice((1, 1, 2, 3))):
        fields = list(places(content))
        if not fields:
            return content
        path = choose.choice(fields)
        if choose.random() < 0.6:
            new = choose.choice(list(HOSTILE.values()))
        else:
            new = content
            for key in choose.choice(fields):  # a part of the file at another place
                new = new[key]
            new = [copy.deepcopy(new)] * choose.choice((1, 1, 3)) if choose.random() < 0.3 else copy.deepcopy(new)
        content = changed(content, path, new)
        if choose.random() < 0.2:
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            del parent[path[-1]]
    return content


def check(seed: int, folder: Path) -> bool:
    """Whether a damaged file was read; raises AssertionError for a finding."""
    choose = random.Random(seed)
    name = choose.choice(list(FILES))
    try:
        path = write(folder, name, damaged(FILES[name][0], choose))
    except (LookupError, ValueError, TypeError, OverflowError, AttributeError, RecursionError):
        return False  # nothing that this format's file can hold
    if choose.random() < 0.3:
        data = path.read_bytes()
        start = choose.randrange(len(data) + 1)
        new, end = choose.randbytes(choose.choice((0, 1, 3))), start + choose.randrange(9)
        path.write_bytes(data[:start] + new + data[end:])
    before, start = _peak_memory(), time.process_time()
    found = problem(folder, name)
    assert found is None, f"{name}: {found}"
    assert time.process_time() - start < MOST_SECONDS, f"{name} took {time.process_time() - start:.0f} s"
    assert _peak_memory() - before < MOST_MEMORY, f"{name} took {_peak_memory() - before >> 20} MiB"
    return True


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(seed: int, count: int | None, until: float, folder: Path) -> str:
    """`count` damaged files, or up to the time `until`; the last one stays in `folder`.

    Raises:
        AssertionError: with what is needed to repeat the case.
    """
    logging.disable(logging.WARNING)  # of shapes that are left out
    place = folder / "annotations"
    place.mkdir(parents=True, exist_ok=True)
    make_folder(place)
    tried = read = 0
    while tried != count and time.monotonic() < until:
        case = seed * 10**7 + tried
        try:
            read += check(case, place)
        except Exception as error:
            raise AssertionError(f"annotations.check({case}, folder): {error!r:.2000}") from error
        tried += 1
    return f"annotations: {tried} damaged files, {read} read or refused by name"
