"""`mask2former-hf env`: what a bug report needs, and which kernel runs where."""

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__
from ..inference.loading import default_device
from ..inference.precision import fastest_dtype
from ..kernels import kernel_report

PACKAGES = (
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "datasets",
    "scipy",
    "numpy",
    "triton",
    "onnx",
    "onnxruntime",
    "openvino",
)


def add_arguments(parser: argparse.ArgumentParser):
    pass


def run(arguments: argparse.Namespace) -> int:
    print(f"mask2former_hf {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name} is not installed")
    devices = [f"cpu with {torch.get_num_threads()} threads"]
    devices += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print("Devices: " + ", ".join(devices))
    for device in dict.fromkeys(("cpu", default_device())):
        dtype, reason = fastest_dtype(device)
        print(f"--dtype auto on {device}: {str(dtype).removeprefix('torch.')}, {reason}")
    print("Deformable attention:")
    for row in kernel_report():
        reasons = f"  ({row['not']})" if row["not"] else ""
        print(f"  {row['device']:5} {row['dtype']:9} {row['kernel']:10}{reasons}")
    return 0
