"""Where Triton's kernels are tested: on a GPU, else in Triton's interpreter, which must be chosen before Triton is
imported and so has a process of its own; and compiled for a GPU that is not there.

Importing this skips a file of tests where Triton is missing.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from mask2former_hf.kernels import triton_gpu

if find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

INTERPRETED = triton_gpu.interpreted()
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
in_the_first_process = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
needs_kernel = pytest.mark.skipif(
    not GPU and not INTERPRETED, reason="no GPU; another test runs this one in Triton's interpreter"
)


def passed_in_the_interpreter(*files: str) -> int:
    """How many tests of these files pass in a process with the interpreter, in which none may fail."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-5000:] + done.stderr[-2000:]
    return int(passed[1])


def compiled_ahead(kernel, constants: dict, types: dict) -> bytes:
    """The code of a kernel for compute capability 9.0; arguments without a type are pointers to float32."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    if not hasattr(triton, "knobs"):
        pytest.skip(f"Triton {triton.__version__} has another interface for compiling ahead of time")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 2}).asm["cubin"]
