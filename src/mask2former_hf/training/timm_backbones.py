"""Backbones of timm (extra `[timm]`) by name or from a folder: their maps, published weights and normalisation."""

import json
import logging
from pathlib import Path

from transformers import PreTrainedConfig, TimmBackbone, TimmBackboneConfig
from transformers.utils import is_timm_available
from transformers.utils.generic import is_timm_local_checkpoint

from ..model.backbone import STRIDES
from ..model.vit_adapter import tapped_blocks

PREFIX = "timm/"  # of the Hub's ids of timm's models, which are the names that timm knows them by

CLASSIFIER = ("num_classes", "global_pool")  # arguments of timm's models that no map depends on


def is_timm(source: str) -> bool:
    """Whether a backbone is one of timm: "timm/NAME", or a folder that timm saved a model into."""
    return source.startswith(PREFIX) or is_timm_local_checkpoint(source)


def timm_config(source: str, vit_neck: str | None) -> PreTrainedConfig:
    """The config of a backbone of timm, asked for the maps that Mask2Former takes: the last at each of the strides 4,
    8, 16, 32, or of a plain ViT the last of all, or those of four blocks for an adapter.

    Args:
        source: "timm/NAME", with or without the tag of its weights, or a folder with timm's `config.json`.

    Raises:
        ImportError: without timm.
        ValueError: for a name that timm does not know, and an architecture with other strides or arguments.
    """
    if not is_timm_available():
        raise ImportError(f"backbone={source}: timm is missing; pip install timm")
    import timm
    import torch

    name = source.removeprefix(PREFIX)
    if not source.startswith(PREFIX):
        fields = _fields(source)
        name = fields["architecture"]
        arguments = {"in_chans": 3} | fields.get("model_args", {})
        given = {key: arguments[key] for key in arguments if key not in CLASSIFIER}
        if given != {"in_chans": 3}:
            raise ValueError(f"model_args={given} in its config.json: only timm's architectures as they are can serve")
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name}; timm.list_models() names those that there are")
    with torch.device("meta"):
        stages = timm.create_model(name, features_only=True).feature_info.info
    strides = [stage["reduction"] for stage in stages]
    if len(set(strides)) == 1:
        maps = [block - 1 for block in tapped_blocks(len(strides))] if vit_neck == "adapter" else [len(strides) - 1]
    elif missing := set(STRIDES) - set(strides):
        raise ValueError(f"timm's {name} has no map at stride {min(missing)}, but at {strides}; choose another model")
    else:
        maps = [max(index for index, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES]
    return TimmBackboneConfig(backbone=name, out_indices=maps)


def timm_weights(source: str, config: PreTrainedConfig) -> dict:
    """Tensors of a published or saved backbone, of which none is random.

    Raises:
        OSError, RuntimeError: if they cannot be loaded, or are not those of the architecture.
    """
    import timm

    logging.getLogger("timm").setLevel(logging.ERROR)  # of the classifier's tensors, which have no place here
    name = source.removeprefix(PREFIX)
    if not source.startswith(PREFIX):
        name = f"local-dir:{source}"
        timm.create_model(name, pretrained=True)  # refuses missing tensors; of maps alone timm takes what there is
    named = TimmBackboneConfig(backbone=name, out_indices=config.out_indices)
    return TimmBackbone(named, pretrained=True).state_dict()


def timm_normalisation(source: str) -> dict[str, list[float]]:
    """`image_mean` and `image_std` that the weights were trained with."""
    if source.startswith(PREFIX):
        import timm

        known = timm.get_pretrained_cfg(source.removeprefix(PREFIX)).to_dict()
    else:
        known = _fields(source).get("pretrained_cfg", {})
    return {f"image_{name}": list(known[name]) for name in ("mean", "std") if known.get(name)}


def _fields(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
