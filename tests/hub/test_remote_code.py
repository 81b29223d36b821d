"""Checkpoints saved with their code: what runs with trust, without it, and without this package."""

import ast
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import randomise, tiny_config, tiny_model
from hub_endpoint import HubEndpoint
from PIL import Image
from processes import python

from mask2former_hf import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
    kernels,
)
from mask2former_hf.hub.remote_code import CONFIG_MODULE, MODEL_FILES, save_with_code

START = """
import builtins, json, sys
def ask(*question):
    raise SystemExit("asked: " + str(question))
builtins.input = ask
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mask2former_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, dynamic_module_utils, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision
checkpoint, io, modules = sys.argv[1:]
dynamic_module_utils.HF_MODULES_CACHE = modules
def origin(thing):
    return type(thing).__module__.split(".")[0]
"""


@pytest.fixture(scope="module")
def parts():
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=30)
    model.class_predictor.weight.data *= 6
    return model, Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with code") / "checkpoint"
    save_with_code(*parts, folder)
    return folder


def run(checkpoint, folder, code, io="", environment=None):
    """The last line, as json, of a process without this package; a new one where the Hub's client reads variables."""
    words = ["-c", START + code, checkpoint, io, folder / "modules"]
    if environment is None:
        done = python(*words, directory=folder)
    else:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_files_of_the_model_travel(checkpoint):
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {
        *(path.name for path in MODEL_FILES.glob("[!_]*.py")),
        f"{CONFIG_MODULE}.py",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    ast.parse((checkpoint / f"{CONFIG_MODULE}.py").read_text())


def test_trusted_code_runs_this_implementation(parts, checkpoint, tmp_path):
    model, processor = parts
    image = Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    image.save(tmp_path / "image.png")
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    expected = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.5, overlap_mask_area_threshold=0.5, label_ids_to_fuse={3, 4}, target_sizes=[(60, 90)]
    )[0]["segments_info"]
    assert len(expected) > 1
    torch.save(outputs.class_queries_logits, tmp_path / "expected.pt")
    report = run(
        checkpoint,
        tmp_path,
        """
load = dict(trust_remote_code=True)
model = AutoModelForUniversalSegmentation.from_pretrained(checkpoint, **load).eval()
processor = AutoImageProcessor.from_pretrained(checkpoint, **load)
image = Image.open(io + "/image.png")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).class_queries_logits
pipe = pipeline("image-segmentation", model=checkpoint, **load)
segments = pipe(image, threshold=0.5)
pipe.model.save_pretrained("again")
again = json.load(open("again/config.json"))["auto_map"]
origins = [origin(x) for x in (AutoConfig.from_pretrained(checkpoint, **load),
    AutoModel.from_pretrained(checkpoint, **load), model, processor, pipe.model, pipe.image_processor)]
of_others = [name for name in ("dinov3_vit", "focalnet", "hiera")
             if f"transformers.models.{name}.modeling_{name}" in sys.modules]
print(json.dumps([(logits - torch.load(io + "/expected.pt")).abs().max().item(), sorted(set(origins)), again,
                  [[s["label"], s["score"]] for s in segments], of_others]))
""",
        tmp_path,
    )
    difference, origins, again, segments, of_others = report
    assert of_others == [], "modules of backbones that this one is not"
    assert difference < 1e-4 and origins == ["transformers_modules"]
    assert [label for label, _ in segments] == [f"LABEL_{info['label_id']}" for info in expected]
    assert [score for _, score in segments] == pytest.approx([info["score"] for info in expected], abs=1e-5)
    assert again == json.loads((checkpoint / "config.json").read_text())["auto_map"], "saved again it stays as it is"


@pytest.mark.parametrize("missing", ["group_norm_", "deformable_attention"])
def test_code_runs_those_kernels_that_an_installed_package_of_another_version_has(missing, monkeypatch):
    names = {"group_norm_", "deformable_attention"}
    expected = {name: None if name == missing else getattr(kernels, name) for name in names}
    monkeypatch.delattr(kernels, missing)
    found = runpy.run_path(str(MODEL_FILES / "compiled.py"))
    assert {name: found[name] for name in names} == expected


def test_without_trust_stock_runs_and_nobody_is_asked(checkpoint, tmp_path):
    origins = run(
        checkpoint,
        tmp_path,
        """
origins = []
for trust in (False, None):
    load = dict(trust_remote_code=trust)
    pipe = pipeline("image-segmentation", model=checkpoint, **load)
    origins.append([origin(x) for x in (AutoConfig.from_pretrained(checkpoint, **load),
        AutoModel.from_pretrained(checkpoint, **load),
        AutoModelForUniversalSegmentation.from_pretrained(checkpoint, **load),
        AutoImageProcessor.from_pretrained(checkpoint, **load), pipe.model, pipe.image_processor)])
print(json.dumps(origins))
""",
    )
    assert origins == [["transformers"] * 6] * 2


def test_trusted_code_comes_from_the_hub(parts, checkpoint, tmp_path):
    with HubEndpoint() as hub:
        environment = hub.environment(tmp_path / "cache")
        origins = run(
            checkpoint,
            tmp_path,
            """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/coded")
api.upload_folder(repo_id="tester/coded", folder_path=checkpoint)
pipe = pipeline("image-segmentation", model="tester/coded", trust_remote_code=True)
untrusted = pipeline("image-segmentation", model="tester/coded")
print(json.dumps([origin(x) for x in (pipe.model, pipe.image_processor, untrusted.model, untrusted.image_processor)]))
""",
            environment=environment,
        )
    assert origins == ["transformers_modules", "transformers_modules", "transformers", "transformers"]


def test_saving_with_code_leaves_objects_and_classes_as_they_were(parts, tmp_path):
    classes = (Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor)
    before = [dict(vars(cls)) for cls in classes]
    fields = [part.to_dict() if hasattr(part, "to_dict") else part.config.to_dict() for part in parts]
    save_with_code(*parts, tmp_path / "coded")
    assert [dict(vars(cls)) for cls in classes] == before
    assert [part.to_dict() if hasattr(part, "to_dict") else part.config.to_dict() for part in parts] == fields
    parts[0].save_pretrained(tmp_path / "plain")
    parts[1].save_pretrained(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "plain" / name).read_text())


def test_what_cannot_travel_is_refused(parts, tmp_path):
    class Mine(Mask2FormerImageProcessor):
        pass

    with pytest.raises(ValueError, match="processor is a .*Mine: only the code"):
        save_with_code(parts[0], Mine(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        save_with_code(*parts, tmp_path / "file")


def test_trusted_code_of_a_video_model_serves_clips_and_frames(tmp_path):
    """The video processor by its file, because transformers' AutoVideoProcessor wants torchvision."""
    model = randomise(Mask2FormerForVideoSegmentation(tiny_config("resnet"))).eval()
    save_with_code(
        model, Mask2FormerVideoProcessor(size={"shortest_edge": 64, "longest_edge": 128}), tmp_path / "coded"
    )
    clip = torch.randn(1, 2, 3, 64, 64)
    with torch.no_grad():
        torch.save([clip, model(clip).class_queries_logits], tmp_path / "expected.pt")
    report = run(
        tmp_path / "coded",
        tmp_path,
        """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
load = dict(trust_remote_code=True)
name = json.load(open(checkpoint + "/preprocessor_config.json"))["auto_map"]["AutoVideoProcessor"]
processor = get_class_from_dynamic_module(name, checkpoint).from_pretrained(checkpoint)
model = AutoModelForUniversalSegmentation.from_pretrained(checkpoint, **load).eval()
clip, expected = torch.load(io + "/expected.pt")
frame = Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).convert("RGB")
with torch.no_grad():
    difference = (model(clip).class_queries_logits - expected).abs().max().item()
    found = processor.post_process_video_instance_segmentation(model(**processor([frame, frame], return_tensors="pt")))
pipe = pipeline("image-segmentation", model=checkpoint, **load)
pipe(frame, subtask="instance")
print(json.dumps([difference, list(found[0]["masks"].shape), origin(model), type(model).__name__,
                  origin(pipe.model), type(pipe.model).__name__,
                  type(AutoModel.from_pretrained(checkpoint, **load)).__name__,
                  type(AutoModelForUniversalSegmentation.from_pretrained(checkpoint)).__module__]))
""",
        tmp_path,
    )
    difference, shape, *classes = report
    assert difference < 1e-4 and shape == [10, 2, 64, 96]
    assert classes == [
        *("transformers_modules", "Mask2FormerForVideoSegmentation"),
        *("transformers_modules", "Mask2FormerForUniversalSegmentation"),
        *("Mask2FormerVideoModel", "transformers.models.mask2former.modeling_mask2former"),
    ]
    with pytest.raises(ValueError, match="processor is a .*Mask2FormerImageProcessor: only the code"):
        save_with_code(model, Mask2FormerImageProcessor(), tmp_path / "mixed")
