"""A backbone frozen as a whole or from its beginning, and how deep each of its parameters lies."""

import re

from torch import nn

from ..model.timm_models import TIMM

ALL = "all"


def stages_of(backbone: nn.Module) -> tuple[str, int]:
    """Name of the list of a backbone's stages, or of a plain ViT's blocks, and how many there are."""
    count = len([name for name in backbone.stage_names if name != "stem"])
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise ValueError(f"a {backbone.config.model_type} has no list of its {count} stages")


def stage_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """The stages of a backbone, or the blocks of a plain ViT, by name."""
    if backbone.config.model_type == TIMM:
        patterns = [_name_of_timm(stage) for stage in backbone.stage_names]
        return {
            name: part
            for name, part in backbone.named_modules()
            if any(pattern.fullmatch(f"{name}.") for pattern in patterns)
        }
    name, _ = stages_of(backbone)
    return {f"{name}.{index}": stage for index, stage in enumerate(backbone.get_submodule(name))}


def depths_of(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """How deep each parameter of a backbone lies, and the number n of stages (of a plain ViT: blocks).

    0 is for embeddings and stem, 1 to n for the stages, n + 1 for what comes after them, such as a last norm.
    """
    if backbone.config.model_type == TIMM:
        return _depths_of_timm(backbone)
    name, count = stages_of(backbone)
    depths, depth = {}, 0
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.")
    for parameter, _ in backbone.named_parameters():
        if match := pattern.match(parameter):
            depth = int(match[1]) + 1
            depths[parameter] = depth
        else:
            depths[parameter] = count + 1 if depth else 0
    return depths, count


def _depths_of_timm(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """timm names the module that each map comes out of: what lies between two of these belongs to the later one."""
    parameters = [name for name, _ in backbone.named_parameters()]
    ends = []
    for stage in backbone.stage_names:
        own = _name_of_timm(stage)
        places = [place for place, name in enumerate(parameters) if own.match(name)]
        if places:
            ends.append((places[0], places[-1]))
    first = ends[0][0]
    depths = {
        name: 0 if place < first else 1 + sum(place > last for _, last in ends)
        for place, name in enumerate(parameters)
    }
    return depths, len(ends)


def _name_of_timm(stage: str) -> re.Pattern:
    """The beginning of the names of a stage's parts; within a flat list of modules timm writes "stages_0" for
    "stages.0"."""
    return re.compile(r"_backbone\.(model\.)?" + re.escape(stage).replace(r"\.", "[._]") + r"\.")


def freeze_backbone(model: nn.Module, stages: int | str = ALL):
    """Take a backbone out of training in place; what is frozen stays in evaluation mode, too.

    Args:
        model: `Mask2FormerForUniversalSegmentation`.
        stages: "all", or how many stages from the beginning (of a plain ViT: blocks), with stem and embeddings.

    Raises:
        ValueError: for more stages than there are.
    """
    encoder = model.model.pixel_level_module.encoder
    if stages == ALL:
        encoder.requires_grad_(False)
        return
    depths, count = depths_of(encoder)
    if not 1 <= int(stages) <= count:
        raise ValueError(
            f"freeze_backbone={stages}: the {encoder.config.model_type} has {count} stages or blocks; give 1 to "
            f"{count}, or {ALL!r}"
        )
    for name, parameter in encoder.named_parameters():
        if depths[name] <= int(stages):
            parameter.requires_grad_(False)
