"""Runs of `train` under a launcher, one after the other: every one has to end well. `python tests/fuzz/launches.py`.

A process that leaves while threads of torch.distributed still work is aborted now and then, more often on a busy
machine (`evaluation.processes.process_group`): start it beside other work. 100 runs of two steps and two processes
take about 40 minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = "--data scenes --train-limit 8 --val-limit 2 --backbone tiny --crop 64 --steps 2 --batch-size 1 --cpu".split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of each run (default: %(default)s)")
    arguments = parser.parse_args()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    failed = 0
    for number in range(1, arguments.runs + 1):
        with tempfile.TemporaryDirectory(prefix="mask2former_hf_launch") as folder:
            command = [sys.executable, *launcher, "-m", "mask2former_hf", "train", *RUN, "--output", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            good = done.returncode == 0 and (Path(folder) / "results.json").is_file()
        failed += not good
        print(f"run {number}: {'good' if good else f'exit {done.returncode}'}; {failed} failed", flush=True)
        if not good:
            print(done.stderr[-5000:], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
