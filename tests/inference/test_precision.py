"""What `dtype` is on a machine, and that every door to results takes it."""

import json

import pytest
import torch
from helpers import tiny_model
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS
from mask2former_hf.inference import segmenter as segmenters
from mask2former_hf.inference.precision import dtype_field, fastest_dtype
from mask2former_hf.inference.video_segmenter import VideoSegmenter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("resnet", task="panoptic", id2label=ID2LABEL, stuff_label_ids=list(STUFF_LABEL_IDS)).save_pretrained(
        folder
    )
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def native(monkeypatch):
    """Makes this CPU one that multiplies bfloat16 natively, or one that does not."""
    return lambda **capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, False)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(name, native, checkpoint):
    native(**{name: True})
    assert fastest_dtype("cpu")[0] == torch.bfloat16
    assert Segmenter(checkpoint, dtype="auto", device="cpu").model.dtype == torch.bfloat16
    assert VideoSegmenter(checkpoint, dtype="auto", device="cpu").model.dtype == torch.bfloat16


def test_auto_is_float32_where_bfloat16_is_slower(native):
    native(avx512_bf16=True, cpu_name="Intel Xeon")
    assert fastest_dtype("cpu")[0] == torch.float32
    native(avx512_bf16=True, amx_bf16=True, cpu_name="Intel Xeon")
    dtype, reason = fastest_dtype("cpu")
    assert dtype == torch.bfloat16 and "AMX" in reason


@pytest.mark.parametrize(
    "amd, amx, dtype", [(True, False, torch.bfloat16), (False, False, torch.float32), (False, True, torch.bfloat16)]
)
def test_an_older_torch_is_asked_for_each_of_them(amd, amx, dtype, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr("mask2former_hf.model.onednn.made_by_amd", lambda: amd)
    assert fastest_dtype("cpu")[0] == dtype


def test_auto_is_float32_elsewhere(native, checkpoint, tmp_path):
    native(avx512_f=True, avx512_bf16=False)
    Segmenter(checkpoint, device="cpu", dtype="bfloat16").model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor().save_pretrained(tmp_path)
    dtypes = [Segmenter(tmp_path, dtype=dtype, device="cpu").model.dtype for dtype in (None, "auto")]
    assert dtypes == [torch.bfloat16, torch.float32]
    dtype, reason = fastest_dtype("cpu")
    assert dtype == torch.float32 and "AVX-512 BF16" in reason


def test_nothing_changes_without_the_argument(checkpoint, native):
    native(avx512_bf16=True)
    assert Segmenter(checkpoint, device="cpu").model.dtype == torch.float32
    assert dtype_field(None, "cpu") == {}


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(ValueError, match="dtype='half': must be auto, float32"):
        Segmenter(checkpoint, dtype="half")


def test_predict_runs_in_the_dtype_of_the_flag(checkpoint, photo, tmp_path, monkeypatch):
    seen, of = [], segmenters.Segmenter.of
    monkeypatch.setattr(
        segmenters.Segmenter,
        "of",
        lambda model, *args, **options: seen.append(model.dtype) or of(model, *args, **options),
    )
    for dtype in ("float32", "bfloat16"):
        output = str(tmp_path / dtype)
        assert main(["predict", photo, "--model", str(checkpoint), "--output", output, "--dtype", dtype]) == 0
    assert seen == [torch.float32, torch.bfloat16]


def test_verify_says_in_which_dtype_it_compared(checkpoint, tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--repeats", "1", "--dtype", "bfloat16", "--tolerance", "0.5", "--json", str(path)]
    assert main(["verify", str(checkpoint), *options]) == 0
    report = json.loads(path.read_text())
    assert report["dtype"] == "bfloat16" and report["class_logits_difference"] > 1e-4
    assert "bfloat16" in capsys.readouterr().out


def test_evaluate_takes_autocast_or_half_weights(checkpoint, capsys):
    scenes = ["--data", "scenes", "--limit", "2", "--model", str(checkpoint)]
    assert main(["evaluate", *scenes, "--dtype", "bfloat16"]) == 0
    assert main(["evaluate", *scenes, "--dtype", "bfloat16", "--bf16"]) == 2
    assert "--dtype bfloat16" in capsys.readouterr().err


def test_env_says_what_auto_is_and_why(capsys, native):
    native(avx512_bf16=True)
    assert main(["env"]) == 0
    assert (
        "--dtype auto on cpu: bfloat16, this CPU multiplies bfloat16 natively (AVX-512 BF16)"
        in capsys.readouterr().out
    )
