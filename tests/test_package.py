"""What the package promises about itself: imports, side effects, the on-disk contract, the architecture's arrows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny_model
from processes import python

import mask2former_hf
from mask2former_hf.kernels import cpu

ROOT = Path(mask2former_hf.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
INNER = re.compile(r"\s*(from mask2former_hf\.|import mask2former_hf\.)")


def run(code, *arguments, cwd=None):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_imports_no_torch():
    assert run("import sys, mask2former_hf; print('torch' in sys.modules or 'transformers' in sys.modules)") == "False"


def test_the_command_line_begins_without_torch():
    """`main` sets how torch's threads wait, which they read once, when torch is loaded; what a user has set stays."""
    code = """
import os, sys
from mask2former_hf.cli.main import main
os.environ.pop("OMP_WAIT_POLICY", None)
waits = []
for given in (None, "ACTIVE"):
    if given is not None:
        os.environ["OMP_WAIT_POLICY"] = given
    try:
        main(["--help"])
    except SystemExit:
        waits.append(os.environ["OMP_WAIT_POLICY"])
print(*waits, "torch" in sys.modules)
"""
    assert run(code) == "PASSIVE ACTIVE False"


def test_every_public_name_can_be_imported():
    for name in mask2former_hf.__all__:
        value = getattr(mask2former_hf, name)
        assert name.isupper() or value.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mask2former_hf.Nothing  # noqa: B018


def test_nothing_is_registered_at_import(tmp_path):
    code = """
import sys, transformers, mask2former_hf
from mask2former_hf import *
from transformers import AutoConfig, AutoModelForUniversalSegmentation
config = AutoConfig.for_model("mask2former")
print(type(config).__module__.split(".")[0], AutoModelForUniversalSegmentation._model_mapping[type(config)].__module__)
"""
    assert python("-c", code).stdout.startswith("transformers transformers.models.mask2former")


def test_a_checkpoint_with_its_code_runs_without_this_package(tmp_path):
    """`trust_remote_code=True` in a process where mask2former_hf cannot be imported gives equal results."""
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4])
    classes = (type(model), type(model.config), mask2former_hf.Mask2FormerImageProcessor)
    kept = [cls._auto_class for cls in classes]
    try:
        for cls, auto in zip(classes, ("AutoModelForUniversalSegmentation", None, "AutoImageProcessor"), strict=True):
            cls.register_for_auto_class(auto) if auto else cls.register_for_auto_class()
        model.save_pretrained(tmp_path / "checkpoint")
        mask2former_hf.Mask2FormerImageProcessor().save_pretrained(tmp_path / "checkpoint")
    finally:
        for cls, value in zip(classes, kept, strict=True):
            cls._auto_class = value
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).class_queries_logits
    torch.save({"pixels": pixels, "expected": expected}, tmp_path / "io.pt")
    code = """
import os, sys
os.environ["HF_MODULES_CACHE"] = sys.argv[2]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mask2former_hf", "scipy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "scipy" else find_spec(name, *rest)
import torch
from transformers import AutoModelForUniversalSegmentation
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder = sys.argv[1]
model = AutoModelForUniversalSegmentation.from_pretrained(folder + "/checkpoint", trust_remote_code=True).eval()
# not by AutoImageProcessor, which in transformers 5.17 asks for torchvision whatever the class needs
name = "image_processing_mask2former.Mask2FormerImageProcessor"
processor = get_class_from_dynamic_module(name, folder + "/checkpoint").from_pretrained(folder + "/checkpoint")
io = torch.load(folder + "/io.pt")
with torch.no_grad():
    output = model(io["pixels"])
assert torch.allclose(output.class_queries_logits, io["expected"], atol=1e-6)
assert "canvas_sizes" in output
processor.post_process_panoptic_segmentation(output, label_ids_to_fuse={3, 4})
print(type(model).__module__.split(".")[0], type(processor).__module__.split(".")[0])
"""
    assert run(code, tmp_path, tmp_path / "modules", cwd=tmp_path) == "transformers_modules transformers_modules"


def test_a_checkpoint_with_its_code_runs_as_the_stock_class_without_trust(tmp_path):
    model = tiny_model("resnet")
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["auto_map"] = {
        "AutoConfig": "configuration_mask2former.Mask2FormerConfig",
        "AutoModelForUniversalSegmentation": "modeling_mask2former.Mask2FormerForUniversalSegmentation",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    stock = transformers.AutoModelForUniversalSegmentation.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(stock).__module__ == "transformers.models.mask2former.modeling_mask2former"


def test_a_plain_checkpoint_carries_no_code(tmp_path):
    tiny_model("resnet").save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_sources_name_no_machine():
    root = ROOT.parents[1]
    words = ("/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "pypi" + ".org")
    for path in [*ROOT.rglob("*.py"), *(root / "tests").rglob("*.py"), root / "README.md"]:
        if path.exists():
            text = path.read_text()
            assert not [word for word in words if word in text], path


def test_examples_and_documents_import_from_the_top_alone():
    files = [*(REPOSITORY / "examples").glob("*.py"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "README.md"]
    if not (REPOSITORY / "examples").is_dir():
        pytest.skip("not in a clone")
    inner = [(path.name, line) for path in files for line in path.read_text().splitlines() if INNER.match(line)]
    assert inner == [] and len(files) > 8


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_kernel_is_there():
    """Else every test of it would be skipped, and nobody would know."""
    assert not isinstance(cpu.library(), str), f"{cpu.library()}; install the package again (pip install -e .)"


def test_its_kernels_for_bfloat16_run_where_the_processor_and_the_compiler_know_it():
    information = Path("/proc/cpuinfo")
    if COMPILER is None or not (information.is_file() and "avx512_bf16" in information.read_text()):
        pytest.skip("no C++ compiler, or no AVX-512 BF16 in /proc/cpuinfo")
    command = [COMPILER, "-mavx512bf16", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(command, input="", capture_output=True, text=True).returncode:
        pytest.skip(f"{COMPILER} does not know AVX-512 BF16")
    assert cpu.multiplies_bfloat16()
