"""Runs examples/train_with_accelerate.py with points that do not depend on processes, or a kill while saving.

python example_worker.py [--fixed-points] [--kill-while-saving NUMBER] -- ARGUMENTS
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

from mask2former_hf.evaluation.processes import process_group

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fixed_points(purpose, image, layers, shape, device, generator):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(purpose)))


def run(arguments, fix_points=False, kill_while_saving=None):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    example = load("train_with_accelerate")
    if fix_points:
        made = example.new_model

        def new_model(*args, **fields):
            model = made(*args, **fields, freeze_batch_norm=True)  # statistics of micro-batches are not the batch's
            model.criterion.draw_points = fixed_points
            return model

        example.new_model = new_model
    if kill_while_saving is not None:
        save_state, calls = example.Accelerator.save_state, []

        def save_or_die(self, folder):
            calls.append(folder)
            if len(calls) == kill_while_saving:
                Path(folder).mkdir(parents=True)
                (Path(folder) / "model.safetensors").write_bytes(b"half of a file")
                os.kill(os.getpid(), 9)
            return save_state(self, folder)

        example.Accelerator.save_state = save_or_die
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    argv, sys.argv = sys.argv, ["train_with_accelerate.py", *map(str, arguments)]
    try:
        example.main(example.parse_arguments())
    finally:
        sys.argv = argv


if __name__ == "__main__":
    split = sys.argv.index("--")
    own = sys.argv[1:split]
    kill = int(own[own.index("--kill-while-saving") + 1]) if "--kill-while-saving" in own else None
    with process_group():
        run(sys.argv[split + 1 :], "--fixed-points" in own, kill)
