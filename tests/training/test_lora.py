"""Low-rank updates: small files that PEFT alone loads, and that merged give the same model."""

import multiprocessing
import re

import pytest
import torch
from helpers import least_budget, random_targets, tiny_model
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.training.lora import with_lora
from mask2former_hf.training.optimization import parameter_groups

peft = pytest.importorskip("peft", reason="low-rank updates need PEFT")
# of PEFT's use of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
PIXELS = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    output = model.eval()(pixel_values=PIXELS)
    return output.class_queries_logits, output.masks_queries_logits


def moved(model):
    """With updates that are not zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def equal(ours, theirs):
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def test_updates_start_at_nothing_and_everything_but_the_classifier_is_frozen():
    model = tiny_model("swin")
    before = logits(model)
    updated = with_lora(model, 2)
    assert equal(logits(updated), before)
    trained = {name for name, parameter in updated.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "class_predictor.modules_to_save" in name for name in trained)


def test_the_classifier_of_pixels_trains_whole_too():
    model = tiny_model("resnet", head_type="per_pixel", num_queries=5)
    updated = with_lora(model, 2)
    trained = {name for name, parameter in updated.named_parameters() if parameter.requires_grad}
    assert any("transformer_module.classifier.modules_to_save" in name for name in trained)


def test_the_file_is_loaded_by_peft_alone_and_merged_to_the_same_model(tmp_path):
    tiny_model("swin").save_pretrained(tmp_path / "base")
    base = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "base")
    updated = moved(with_lora(base, 2))
    expected = logits(updated)
    updated.save_pretrained(tmp_path / "adapter")
    fresh = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "base")
    assert not equal(logits(fresh), expected)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert equal(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert equal(logits(merged), expected) and type(merged) is Mask2FormerForUniversalSegmentation
    assert set(merged.state_dict()) == set(tiny_model("swin").state_dict())


def test_an_adapter_of_a_model_of_usual_size_has_at_most_a_twentieth_of_its_weights():
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    updated = with_lora(model, 8)
    assert sum(p.numel() for p in updated.parameters() if p.requires_grad) <= 0.05 * total


def test_with_a_new_head_the_backbone_alone_has_updates():
    updated = with_lora(tiny_model("swin"), 2, ["query", "q_proj"], new_head=True)
    names = [name for name, parameter in updated.named_parameters() if parameter.requires_grad]
    low = [name for name in names if "lora_" in name]
    assert low and all("pixel_level_module.encoder." in name and ".q" in name for name in low)
    whole = {name for name in names if "modules_to_save" in name}
    assert whole == set(names) - set(low)
    for part in ("pixel_level_module.decoder", "transformer_module", "class_predictor"):
        assert any(part in name for name in whole)
    with pytest.raises(ValueError, match="lora_target=w_proj: no linear layer's name ends so; there are .*fc1"):
        with_lora(tiny_model("swin"), 2, ["w_proj"])


def test_a_run_leaves_a_whole_model_and_its_adapter_and_goes_on(tmp_path, capsys):
    tiny_model("resnet", task="panoptic").save_pretrained(tmp_path / "base")
    Mask2FormerImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "base")
    run = ["train", "--data", "scenes", "--train-limit", 4, "--val-limit", 2, "--crop", 64, "--batch-size", 2, "--cpu"]
    run += [
        "--model",
        tmp_path / "base",
        "--lora",
        2,
        "--learning-rate",
        0.01,
        "--eval-every",
        1,
        "--output",
        tmp_path / "run",
    ]
    run += ["--memory-budget", least_budget(capsys, run)]
    for more in (["--steps", 1], ["--steps", 2, "--resume"]):
        assert main([str(word) for word in [*run, *more]]) == 0
        said = capsys.readouterr().out
        assert "blocks computed again in the backward pass are" in said
    assert re.search(r"transformer decoder +0\.\d\d M +0\.0\d M ", said)
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "run"))
    changed = {name for name in after if name in before and not torch.equal(after[name], before[name])}
    assert any("fc1.weight" in name for name in changed) and not any("norm" in name for name in changed)
    adapter = tmp_path / "run" / "adapter"
    assert len(load_file(adapter / "adapter_model.safetensors")) > 10
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()
    assert Segmenter(tmp_path / "run").task == "panoptic"


def two_steps(rank, folder):
    """One of two processes, each with an image of its own; keeps what it trained."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model = moved(with_lora(tiny_model("swin"), 2)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, backbone_multiplier=1.0, layer_decay=0.5))
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # refuses a second step if a gradient was missing
    masks, labels = random_targets([3], (64, 64), seed=rank)
    for _ in range(2):
        parallel(torch.randn(1, 3, 64, 64), mask_labels=masks, class_labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.save((trained, sorted(group["lr"] for group in optimizer.param_groups)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_updates_at_the_rates_of_their_layers(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=two_steps, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    (first, rates), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert rates == [0.01 * 0.5**layers for layers in (4, 3, 2, 1, 0)]  # embeddings are no linear layer; the head
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())
    before = moved(with_lora(tiny_model("swin"), 2)).state_dict()
    assert all(not torch.equal(x, before[name]) for name, x in first.items() if "lora_B" in name)
