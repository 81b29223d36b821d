"""Publishing to and fetching from a Hub on the loopback, in processes of their own: a client reads settings once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import SUPPORT, tiny_config, tiny_model
from hub_endpoint import HubEndpoint
from transformers import TrainingArguments

import mask2former_hf
from mask2former_hf import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
)
from mask2former_hf.hub.model_card import write_model_card

SOURCES = str(Path(mask2former_hf.__file__).parents[1])
START = """
import sys
sys.path.insert(0, sys.argv[1])
import json, time
import torch
from helpers import tiny_model
from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.hub.publishing import push_to_hub
model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4])
processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
same = lambda other: all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
"""


def run(hub, folder, code, **options):
    """Standard output's last line, as json, of a process that uses the Hub."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", START + code, str(SUPPORT)],
        env=os.environ | hub.environment(folder / "cache", **options) | {"PYTHONPATH": SOURCES},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub, and what came of publishing to it in several ways, by one process, each with a model of its own."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    parts = [FETCH, BY_TRAINER, BY_OUR_TRAINER, BY_CONVERT, SECRETLY]
    code = "reports = []\n"
    for part in parts:
        code += (
            f"model = tiny_model('resnet', task='panoptic', stuff_label_ids=[3, 4])\n{part}\nreports.append(report)\n"
        )
    with HubEndpoint() as endpoint:
        reports = run(endpoint, tmp_path_factory.mktemp("publisher"), code + "print(json.dumps(reports))")
        yield endpoint, dict(zip(parts, reports, strict=True))


FETCH = """
import os
from huggingface_hub import snapshot_download
from transformers import pipeline
from PIL import Image
import mask2former_hf.hub.registration as registration

report = {}
model.push_to_hub("tester/plain")
processor.push_to_hub("tester/plain")
report["plain"] = same(Mask2FormerForUniversalSegmentation.from_pretrained("tester/plain"))
address = push_to_hub(model, processor, "tester/whole", dataset="tester/photos", metrics={"pq": 0.25}, license="mit")
first = address.rsplit("/", 1)[1]
old = model.class_predictor.bias.data.clone()
model.class_predictor.bias.data += 1
push_to_hub(model, processor, "tester/whole", revision="second", private=True)
load = Mask2FormerForUniversalSegmentation.from_pretrained
report["branch"] = same(load("tester/whole", revision="second"))
report["main"] = torch.equal(load("tester/whole").class_predictor.bias, old)
report["commit"] = torch.equal(load("tester/whole", revision=first).class_predictor.bias, old)
folder = snapshot_download("tester/whole", revision="second")
report["files"] = sorted(os.listdir(folder))
report["snapshot"] = same(load(folder))
report["size"] = dict(Mask2FormerImageProcessor.from_pretrained("tester/whole").size)
registration.register()
pipe = pipeline(model="tester/whole", revision="second")  # the task is the one of the model card
report["pipeline"] = [type(pipe.model).__module__, pipe.task, same(pipe.model)]
report["segments"] = isinstance(pipe(Image.new("RGB", (70, 50))), list)
registration.unregister()
"""


def test_publish_and_fetch(published):
    hub, reports = published
    report = reports[FETCH]
    assert report.pop("files") == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert {name: value for name, value in report.pop("size").items() if value} == {
        "shortest_edge": 64,
        "longest_edge": 128,
    }
    assert report.pop("pipeline") == ["mask2former_hf.model.modeling_mask2former", "image-segmentation", True]
    assert set(report.values()) == {True}, report
    whole = hub.repositories["tester/whole"]
    assert len(whole.messages) == 3, "an initial commit and one per push: nothing is ever half there"
    card = whole.files("main")["README.md"].decode()
    assert 'Segmenter("tester/whole")' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["datasets"] == ["tester/photos"] and metadata["license"] == "mit"
    assert metadata["model-index"][0]["results"][0]["metrics"] == [{"type": "pq", "value": 0.25}]


BY_TRAINER = """
from transformers import Trainer, TrainingArguments
from helpers import random_targets
masks, classes = random_targets([2, 1], (64, 64))
examples = [{"pixel_values": torch.randn(3, 64, 64), "mask_labels": m, "class_labels": c}
            for m, c in zip(masks, classes)]
def collate(rows):
    return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]),
            "mask_labels": [r["mask_labels"] for r in rows], "class_labels": [r["class_labels"] for r in rows]}
arguments = TrainingArguments("run", max_steps=2, per_device_train_batch_size=2, push_to_hub=True, report_to=[],
    hub_model_id="tester/trained", save_steps=1, remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    hub_strategy="every_save")
trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate, processing_class=processor)
trainer.train()
trainer.push_to_hub(blocking=True)
other = Mask2FormerForUniversalSegmentation.from_pretrained("tester/trained")
report = [same(other), type(Mask2FormerImageProcessor.from_pretrained("tester/trained")).__name__]
"""


def test_trainer_publishes(published):
    hub, reports = published
    assert reports[BY_TRAINER] == [True, "Mask2FormerImageProcessor"]
    files = set(hub.repositories["tester/trained"].files())
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= files


BY_OUR_TRAINER = """
from mask2former_hf.data.scenes import ID2LABEL, ScenesDataset, STUFF_LABEL_IDS
from mask2former_hf.training.trainer import Mask2FormerTrainer, Mask2FormerTrainingArguments
model.config.id2label = ID2LABEL
arguments = Mask2FormerTrainingArguments("run", max_steps=1, per_device_train_batch_size=1, push_to_hub=True,
    report_to=[], hub_model_id="tester/ours", use_cpu=True, disable_tqdm=True, save_strategy="no")
trainer = Mask2FormerTrainer(model, arguments, processor=processor, train_dataset=ScenesDataset(2, size=64),
    eval_dataset=ScenesDataset(1, size=64))
trainer.train()
trainer.evaluate()
trainer.push_to_hub(blocking=True, dataset="scenes")
other = Mask2FormerForUniversalSegmentation.from_pretrained("tester/ours")
assert same(other)
from huggingface_hub import hf_hub_download
report = open(hf_hub_download("tester/ours", "README.md")).read()
"""


def test_our_trainer_publishes_its_figures(published):
    hub_card = published[1][BY_OUR_TRAINER]
    assert "| pq |" in hub_card and "tester/ours" in hub_card and "learning_rate" in hub_card


BY_CONVERT = """
from mask2former_hf.cli.main import main
from mask2former_hf.conversion.converting import to_original
torch.save({"model": to_original(model)}, "model.pth")
code = main(["convert", "model.pth", "--output", "converted", "--push", "tester/converted"])
other = Mask2FormerForUniversalSegmentation.from_pretrained("tester/converted")
report = [code, same(other)]
"""


def test_convert_publishes_what_it_made(published):
    hub, reports = published
    assert reports[BY_CONVERT] == [0, True]
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.repositories["tester/converted"].files())


def test_a_lost_connection_publishes_nothing_and_says_so(hub, tmp_path):
    hub.lose_uploads = 6  # an attempt and five repetitions
    report = run(
        hub,
        tmp_path,
        """
time.sleep = lambda seconds: None
try:
    push_to_hub(model, processor, "tester/lost")
    message = "no error"
except ConnectionError as error:
    message = str(error)
import huggingface_hub
files = huggingface_hub.HfApi().list_repo_files("tester/lost")
push_to_hub(model, processor, "tester/lost")
print(json.dumps([message, files, same(Mask2FormerForUniversalSegmentation.from_pretrained("tester/lost"))]))
""",
    )
    message, files, works_afterwards = report
    assert files == [] and works_afterwards
    assert re.search(r"repo_id='tester/lost': the connection to http://127.* was lost.*Nothing was published", message)


SECRETLY = "push_to_hub(model, processor, 'tester/secret', private=True); report = None"


def test_a_private_repository_without_token_says_so(published, tmp_path):
    report = run(
        published[0],
        tmp_path / "stranger",  # with a cache of its own
        """
report = []
for use in (
    lambda: Mask2FormerForUniversalSegmentation.from_pretrained("tester/secret"),
    lambda: Mask2FormerImageProcessor.from_pretrained("tester/secret"),
    lambda: push_to_hub(model, processor, "tester/secret"),
    lambda: push_to_hub(model, processor, "tester/secret", token="hf_wrong"),
):
    try:
        report.append(["no error", str(use())])
    except Exception as error:
        report.append([type(error).__name__, str(error)])
print(json.dumps(report))
""",
        token=None,
    )
    for name, message in report[:2]:
        assert name == "OSError" and "private repository, make sure to pass a token" in message
    for name, message in report[2:]:
        assert name == "PermissionError" and "repo_id='tester/secret'" in message and "hf auth login" in message


@pytest.fixture(scope="module")
def model():
    return tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4])


def read(path):
    _, metadata, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_what_is_known(model, tmp_path):
    metadata, text = read(
        write_model_card(
            model,
            tmp_path,
            Mask2FormerImageProcessor(),
            repo_id="me/scenes",
            dataset="Scenes | generated",
            metrics={"pq": {"all": {"pq": 0.5, "n": 3}, "name": "x"}, "ap": float("nan")},
            training_arguments=TrainingArguments(str(tmp_path), learning_rate=3e-4, max_steps=7, report_to=[]),
            license="cc-by-4.0",
            base_model="facebook/mask2former-swin-tiny-coco-panoptic",
            parity={
                "class_logits_difference": 1e-7,
                "checkpoint": "/private/path",
                "metrics": {"ours": {"pq": 0.41}, "stock": {"pq": 0.4}},
            },
        )
    )
    assert metadata["license"] == "cc-by-4.0" and metadata["pipeline_tag"] == "image-segmentation"
    assert metadata["base_model"] == "facebook/mask2former-swin-tiny-coco-panoptic"
    assert "datasets" not in metadata, "a name that is no id of the Hub is not linked"
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "Scenes | generated"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for expected in (
        "| Task | panoptic |",
        "| Data | Scenes \\| generated |",
        "| Classes | 5 (3 things, 2 stuff) |",
        f"| Parameters | {parameters / 1e6:.1f} M |",
        "| pq_all_pq | 0.5 |",
        "| learning_rate | 0.0003 |",
        "| max_steps | 7 |",
        "| class logits difference | 1e-07 |",
        "| pq | 0.41 | 0.4 |",
        "| 3 | LABEL_3 | stuff |",
        "Weights: `cc-by-4.0`. Code (mask2former_hf): Apache-2.0.",
        "post_process_panoptic_segmentation",
    ):
        assert expected in text, expected
    assert "nan" not in text and "/private/path" not in text and "num_train_epochs" not in text


def test_a_card_leaves_out_what_is_not_known(model, tmp_path):
    metadata, text = read(write_model_card(model, tmp_path / "new" / "scenes"))
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    assert text.lstrip().startswith("# scenes\n") and "None" not in text
    assert "## Results" not in text and "## Training" not in text and "Weights: not stated" in text


def test_a_card_takes_the_stuff_from_the_processor_where_the_config_is_silent(tmp_path):
    silent = tiny_model("resnet", task="panoptic")
    _, text = read(write_model_card(silent, tmp_path, Mask2FormerImageProcessor(label_ids_to_fuse=[1])))
    assert "| Classes | 5 (4 things, 1 stuff) |" in text and "| 1 | LABEL_1 | stuff |" in text
    assert "label_ids_to_fuse={1}" in text


def test_the_examples_of_a_card_are_python(model, tmp_path):
    for model_of_task in (model, tiny_model("resnet", task="semantic"), tiny_model("resnet", task="instance")):
        _, text = read(write_model_card(model_of_task, tmp_path, with_code=True))
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            compile(block, "README.md", "exec")
        assert f"post_process_{model_of_task.config.task}_segmentation" in text


def test_the_card_of_a_model_of_clips_shows_how_to_follow_objects(tmp_path):
    model = Mask2FormerForVideoSegmentation(tiny_config("resnet", task="instance"))
    assert "VideoSegmenter" in write_model_card(model, tmp_path).read_text()
    image = Mask2FormerForUniversalSegmentation(tiny_config("resnet", task="instance"))
    assert "VideoSegmenter" not in write_model_card(image, tmp_path).read_text()
