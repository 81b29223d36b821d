"""Parameter groups and schedules against what the original's optimizer was given."""

import json

import pytest
import torch
from helpers import GOLDEN, golden_case, needs_golden, tiny_model  # noqa: F401

from mask2former_hf.conversion.original import translate
from mask2former_hf.training.optimization import multi_step_schedule, parameter_groups, polynomial_schedule

MILESTONES = {  # of the recipes by their number of steps (reference, section b)
    368750: (327778, 355092),
    737500: (655556, 710184),
    6000: (4000,),
    8000: (5500,),
}


@needs_golden
def test_golden_parameter_groups(golden_case, tmp_path):  # noqa: F811
    model, golden = golden_case.model(tmp_path), golden_case.json("optimizer_groups.json")
    settings = {}
    for group in parameter_groups(model):
        for parameter in group["params"]:
            settings[parameter] = (group["lr"], group["weight_decay"])
    ours = {name: settings.get(parameter) for name, parameter in model.named_parameters()}
    # compare as multisets per (lr, decay): names in memory and in files differ for Swin
    expected = {}
    for group in golden:
        target = translate(group["name"])
        if target is None:
            continue
        label = (round(group["lr"] * 1e7), group["weight_decay"])
        expected[label] = expected.get(label, 0) + (len(target) if isinstance(target, tuple) else 1)
    counted = {}
    for name, setting in ours.items():
        if setting is None:
            assert "swin.layernorm" in name
            continue
        if "normalization" in name and golden_case.folder.name.startswith("r50"):
            continue  # frozen buffers in the original
        label = (round(setting[0] * 1e7), setting[1])
        counted[label] = counted.get(label, 0) + 1
    assert counted == expected


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = tiny_model()
    grouped = [p for group in parameter_groups(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in model.parameters())


@needs_golden
def test_golden_schedules():
    cases = json.loads((GOLDEN / "lr_schedules" / "lr.json").read_text())
    kinds = set()
    for name, case in cases.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        if case["scheduler"] == "WarmupPolyLR":
            schedule = polynomial_schedule(optimizer, case["max_iter"])
        else:
            schedule = multi_step_schedule(optimizer, MILESTONES[case["max_iter"]])
        kinds.add(case["scheduler"])
        for step, rate in case["values"]:
            assert 1e-4 * schedule.lr_lambdas[0](step) == pytest.approx(rate, rel=1e-6), name
    assert kinds == {"WarmupPolyLR", "LRMultiplier"}


@needs_golden
def test_warm_up_is_eomt_s_of_new_parameters():
    for case in json.loads((GOLDEN / "vit_adapter" / "schedules.json").read_text())["two_stage_warmup"]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case["base"]["other"])
        total, (warmup, _) = case["total_steps"], case["warmup_steps"]
        schedule = polynomial_schedule(optimizer, total, case["poly_power"], warmup=warmup)
        for step, (_, expected) in case["lr_by_step_backbone_other"].items():
            ours = case["base"]["other"] * schedule.lr_lambdas[0](int(step))
            assert ours == pytest.approx(expected, rel=1e-6), step


def test_warm_up_comes_before_the_drops_of_a_multi_step_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = multi_step_schedule(optimizer, [6, 8], warmup=4).lr_lambdas[0]
    assert [factor(step) for step in range(10)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])
