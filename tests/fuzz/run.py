"""Fuzzing of what reads foreign bytes and of the C++ kernel: `python tests/fuzz/run.py --minutes 10`.

Each target runs in a process of its own, one after the other, for an equal share of the time. A finding ends with the
offending case's file or literal; add it to `test_fuzz.py` when it is mended. Another `--seed` gives other cases.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = ("checkpoints", "run_lengths", "annotations", "kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the cases (default: the time)")
    parser.add_argument("--count", type=int, help="cases of each target, if the time suffices")
    parser.add_argument("--target", choices=TARGETS, action="append", help="instead of all; may be repeated")
    parser.add_argument("--folder", type=Path, help="where the current case lies (default: a new temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mask2former_hf_fuzz"))
    targets = arguments.target or TARGETS
    if len(targets) == 1:
        sys.path.insert(0, str(Path(__file__).parent))
        until = time.monotonic() + 60 * arguments.minutes
        print(importlib.import_module(targets[0]).run(arguments.seed, arguments.count, until, folder), flush=True)
        return 0
    print(f"seed {arguments.seed}, cases in {folder}", flush=True)
    share = [
        "--minutes",
        str(arguments.minutes / len(targets)),
        "--seed",
        str(arguments.seed),
        "--folder",
        str(folder),
    ]
    share += [] if arguments.count is None else ["--count", str(arguments.count)]
    codes = [subprocess.run([sys.executable, __file__, "--target", target, *share]).returncode for target in targets]
    for target, code in zip(targets, codes, strict=True):
        if code:
            print(f"{target}: FOUND (exit {code}); the case is the newest file in {folder}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
