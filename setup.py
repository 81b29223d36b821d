"""Builds the optional CPU kernels; everything else about the package stands in setup.cfg."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/mask2former_hf/kernels")
SOURCES = sorted(str(path) for path in FOLDER.glob("*_cpu.cpp"))
HEADERS = sorted(str(path) for path in FOLDER.glob("*.h"))
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def build(command: list[str], target: Path):
    """The library, its sources compiled side by side."""

    def run(*arguments: str):
        subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)

    def compiled(source: str) -> str:
        made = str(Path(folder, Path(source).stem + ".o"))
        run("-c", source, "-o", made)
        return made

    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        largest_first = sorted(SOURCES, key=lambda source: "msda_" not in source)
        run("-shared", *pool.map(compiled, largest_first), "-o", str(target))


class BuildKernel(build_ext):
    """A plain shared library instead of a Python module. Without a compiler the package installs without it."""

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # one of an earlier source would not fit
        compiler = os.environ.get("CXX", "c++").split()
        # Not every compiler knows AMX or AVX-512 BF16, nor can every platform choose between versions of a function
        # when it loads them.
        for extra in ([], ["-DMSDA_NO_AMX"], ["-DMSDA_NO_BF16"], ["-DMSDA_NO_BF16", "-DMSDA_NO_CLONES"]):
            try:
                return build([*compiler, *FLAGS, *extra], target)
            except (OSError, subprocess.CalledProcessError) as error:
                problem = getattr(error, "stderr", None) or error
        print(
            "mask2former_hf: the CPU kernel was not built, the package works without it, more slowly "
            f"({str(problem).strip().splitlines()[-1]})",
            file=sys.stderr,
        )

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + SUFFIX

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[
        Extension("mask2former_hf.kernels._msda_cpu", SOURCES, depends=HEADERS, language="c++", optional=True)
    ],
    cmdclass={"build_ext": BuildKernel},
)
