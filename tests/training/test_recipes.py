"""The original's recipes: every row of the table made from its resolved configurations, and its learning rates."""

import json
import re

import pytest
from helpers import GOLDEN, SHARED, needs_golden

from mask2former_hf import Mask2FormerConfig
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.training.recipes import load_recipe, recipe_names
from mask2former_hf.training.setting_checks import check
from mask2former_hf.training.settings import TrainingSettings, complete
from mask2former_hf.training.vit_recipes import vit_recipe, vit_recipe_names

BEHAVIOUR = SHARED / "reference" / "original_behaviour.md"
needs_table = pytest.mark.skipif(
    not BEHAVIOUR.is_file(), reason="table of the original's recipes (../shared) not found"
)


def as_row(recipe):
    """A recipe in the words of the table."""
    backbone, augmentation = recipe.backbone, recipe.augmentation
    if backbone["type"] == "resnet":
        names = [f"R{backbone['depth']}", backbone["norm"]]
    else:
        names = [f"Swin e{backbone['embed_dim']} d{backbone['depths']}"]
        names += [f"w{backbone['window_size']} dp{backbone['drop_path_rate']} pre{backbone['image_size']}"]
    steps = "-"
    if recipe.milestones:
        steps = f"({', '.join(map(str, recipe.milestones))}{',' if len(recipe.milestones) == 1 else ''})"
    if recipe.video:
        mapper = "YTVIS"
        sizes = f"({', '.join(map(str, augmentation['short_sides']))}) max {augmentation['max_size']}, "
        sizes += f"{augmentation['frames']} frames +-{augmentation['frame_range']}"
    elif recipe.mapper.endswith("lsj"):
        mapper = recipe.mapper
        sizes = f"LSJ {augmentation['min_scale']}-{augmentation['max_scale']} @ {augmentation['image_size']}"
    else:
        mapper, sides = recipe.mapper, augmentation["short_sides"]
        crop, pad = augmentation["crop_size"], augmentation["pad_size"]
        sizes = f"short {sides[0]}..{sides[-1]} max {augmentation['max_size']}; crop ({crop[0]}, {crop[1]}); "
        sizes += f"pad {-1 if pad is None else pad}; colour {augmentation['colour']}; "
        sizes += f"catmax {augmentation['max_category_area']}"
    return [
        recipe.config,
        str(recipe.num_labels),
        str(recipe.ignore_value),
        str(recipe.num_queries),
        *names,
        recipe.pretrained,
        f"{recipe.iterations} / {steps} / {recipe.warmup_iterations}@{recipe.warmup_factor}",
        {"multistep": "WarmupMultiStepLR", "polynomial": "WarmupPolyLR"}[recipe.schedule],
        mapper,
        sizes,
        f"{recipe.test_size['shortest_edge']} max {recipe.test_size['longest_edge']}",
        "".join("Y" if task in recipe.evaluates else "N" for task in ("semantic", "instance", "panoptic")),
        f"{recipe.object_mask_threshold}/{recipe.overlap_threshold}",
        str(recipe.eval_period),
    ]


@needs_table
def test_every_row_equals_the_original_s_configuration():
    rows = {}
    for line in BEHAVIOUR.read_text().split("# Full per-config table")[1].splitlines():
        cells = [cell.strip() for cell in line.strip(" |").split(" | ")]
        if re.match(r"\w[\w-]*/", cells[0]):
            rows[cells[0]] = cells
    assert len(rows) == 59
    assert {recipe.config: as_row(recipe) for recipe in map(load_recipe, recipe_names())} == rows


RECORDED = {
    "ade20k_sem": "ade20k-semantic-r50",
    "coco_panoptic": "coco-panoptic-r50",
    "coco_panoptic_swinL": "coco-panoptic-swin-l-in21k",
    "cityscapes_pan": "cityscapes-panoptic-r50",
    "mapillary_pan": "mapillary-panoptic-r50",
    "ytvis2019": "ytvis-2019-r50",
    "ytvis2021": "ytvis-2021-r50",
}


@needs_golden
def test_schedules_give_the_recorded_learning_rates():
    recorded = json.loads((GOLDEN / "lr_schedules" / "lr.json").read_text())
    assert set(recorded) == set(RECORDED)
    for case, content in recorded.items():
        recipe = load_recipe(RECORDED[case])
        for step, rate in content["values"]:
            if recipe.schedule == "multistep":
                expected = 1e-4 * 0.1 ** sum(step >= milestone for milestone in recipe.milestones)
            else:
                expected = 1e-4 * (1 - step / recipe.iterations) ** 0.9
            assert rate == pytest.approx(expected, rel=1e-6), (case, step)


def test_short_sides_are_half_to_double_in_sixteen_steps():
    sides = load_recipe("ade20k-semantic-swin-t").augmentation["short_sides"]
    assert sides == [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024]


def test_names_tell_data_task_and_backbone():
    assert load_recipe("coco-panoptic-r50").config == "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep"
    name = "cityscapes-instance-swin-l-in21k"
    config = "cityscapes/instance-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_90k"
    assert load_recipe(name).config == config
    assert load_recipe("ytvis-2019-r101").video and load_recipe("ytvis-2019-r101").task == "instance"
    for name in recipe_names():
        recipe = load_recipe(name)
        assert name.startswith(recipe.class_set + "-")
        assert ("in21k" in name) == ("IN21k" in recipe.config)


def test_unknown_name_lists_similar_ones():
    with pytest.raises(ValueError, match="coco-panoptic-r50"):
        load_recipe("coco-panoptic-r5")


@pytest.mark.parametrize("name", recipe_names())
def test_class_set_has_as_many_classes_as_the_model(name):
    recipe = load_recipe(name)
    assert len(ClassTable.load(recipe.class_set)) == recipe.num_labels


@pytest.mark.parametrize("name", ["coco-panoptic-r101", "ade20k-semantic-swin-s", "cityscapes-panoptic-r50"])
def test_fields_make_a_configuration(name):
    recipe = load_recipe(name)
    config = Mask2FormerConfig(backbone_config=recipe.backbone_fields(), **recipe.config_fields())
    assert config.num_labels == recipe.num_labels and config.task == recipe.task
    assert config.freeze_batch_norm == (name == "coco-panoptic-r101")
    assert (
        config.backbone_config.depths
        == {"r101": [3, 4, 23, 3], "s": [2, 2, 18, 2], "r50": [3, 4, 6, 3]}[name.rpartition("-")[2]]
    )


@pytest.mark.parametrize("name", vit_recipe_names())
def test_a_vit_s_recipe_is_settings_that_a_run_takes_with_the_source_of_each(name):
    recipe = vit_recipe(name)
    given = {"output": "run", "recipe": name, "data": "label-maps", "accumulate": 2}
    given |= {} if "backbone" in recipe.settings else {"model": "a/checkpoint"}
    given |= {} if {"steps", "epochs"} & set(recipe.settings) else {"steps": 100}
    settings, original = complete(TrainingSettings(**given))
    check(settings)
    assert original is None and settings.classes == recipe.class_set
    own = {key: value for key, value in recipe.settings.items() if key != "batch_size"}
    assert {key: getattr(settings, key) for key in own} == own
    assert settings.batch_size * 2 == recipe.settings.get("batch_size", 2 * 4)
    assert re.search(r"[\w-]+/[\w-]+ [0-9a-f]{7}", recipe.source) and "Not run at this size here" in str(recipe)
    assert {"frozen": "freeze_backbone" in own, "pyramid": own.get("vit_neck") == "pyramid"} == {
        word: word in name for word in ("frozen", "pyramid")
    }


@needs_golden
def test_layer_decay_of_vits_is_what_their_sources_recorded():
    recorded = json.loads((GOLDEN / "vit_adapter" / "schedules.json").read_text())["layer_decay"]
    rates = {"vit_adapter": "ade20k-semantic-beit-l-adapter", "vitdet": "coco-instance-vit-b-pyramid"}
    rates |= {"eomt": "coco-panoptic-dinov2-l-adapter"}
    for source, name in rates.items():
        assert vit_recipe(name).settings["layer_decay"] in {case.get("rate") for case in recorded[source]}, source


def test_given_settings_come_before_those_of_a_vit_s_recipe():
    name = "coco-panoptic-dinov2-l-adapter"
    settings, _ = complete(TrainingSettings(output="run", recipe=name, model="a/checkpoint", steps=10, crop=320))
    assert (settings.backbone, settings.vit_neck, settings.epochs, settings.crop) == (None, None, None, 320)
    with pytest.raises(ValueError, match="give model="):
        check(complete(TrainingSettings(output="run", recipe="ade20k-semantic-beit-l-adapter-896"))[0])
    with pytest.raises(ValueError, match="not one of the original's"):
        load_recipe(name)
    with pytest.raises(ValueError, match="coco-panoptic-dinov2-l-adapter"):
        load_recipe("coco-panoptic-dinov2-adapter")
