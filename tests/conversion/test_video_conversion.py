"""The original's video checkpoints, converted to models of clips and back."""

import pickle

import pytest
import torch
from helpers import GOLDEN, needs_golden, relative_difference
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.conversion.checkpoint_files import read_checkpoint


@needs_golden
@pytest.mark.parametrize("case", ["video_r50_ytvis", "video_swin_ytvis"])
def test_a_video_checkpoint_becomes_a_model_of_clips_and_comes_back_bit_for_bit(case, tmp_path, capsys):
    folder = GOLDEN / case
    state = load_file(folder / "model.safetensors")
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    source = tmp_path / "model_final.pkl"
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}))
    converted, back = tmp_path / "out", tmp_path / "back.pth"
    assert main(["convert", str(source), "--config", str(folder / "config.json"), "--output", str(converted)]) == 0
    assert "predict VIDEO" in capsys.readouterr().out
    model, info = Mask2FormerForVideoSegmentation.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())
    assert model.config.task == "instance" and model.config.id2label[0] == "person" and model.config.num_labels == 40
    frames = load_file(folder / "inference_inputs.safetensors")
    processor = Mask2FormerVideoProcessor.from_pretrained(converted)
    assert processor.size["shortest_edge"] == 67, "INPUT.MIN_SIZE_TEST"
    inputs = processor([frames[f"frame{t}"] for t in range(5)], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).class_queries_logits
    golden = load_file(folder / "inference_raw.safetensors")["pred_logits"]
    assert relative_difference(logits, golden) <= 1e-5
    assert main(["convert", str(converted), "--to", "original", "--output", str(back)]) == 0
    restored = read_checkpoint(back).tensors
    assert set(restored) == set(state)
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
