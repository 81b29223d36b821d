"""A training configuration of the original: a yaml for detectron2, with the files it is based on."""

import ast
from pathlib import Path

import yaml

from .architecture import RESNET_DEPTHS, Settings
from .designs import design_of_yaml
from .names import CheckpointError

# DATASETS.TEST begins with -> class set; the longest match counts
CLASS_SETS = {
    "coco_2017_val_panoptic": "coco-panoptic",
    "coco_2017_val": "coco-instance",
    "coco_2017_test_stuff_10k": "coco-stuff-10k",
    "ade20k_sem_seg": "ade20k-semantic",
    "ade20k_panoptic": "ade20k-panoptic",
    "ade20k_instance": "ade20k-instance",
    "cityscapes_fine_sem_seg": "cityscapes-semantic",
    "cityscapes_fine_panoptic": "cityscapes-panoptic",
    "cityscapes_fine_instance_seg": "cityscapes-instance",
    "mapillary_vistas_sem_seg": "mapillary-semantic",
    "mapillary_vistas_panoptic": "mapillary-panoptic",
    "ytvis_2019": "ytvis-2019",
    "ytvis_2021": "ytvis-2021",
}
# Values of detectron2 and of the original's add_maskformer2_config for keys that a yaml leaves out
DEFAULT_TEST_SIZE = (800, 1333)
DEFAULT_MEAN, DEFAULT_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


class _Loader(yaml.SafeLoader):
    """Plain yaml; expressions such as `!!python/object/apply:eval [...]` are not evaluated but read as `None`."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def read_yaml(path: str | Path, inside: tuple[Path, ...] = ()) -> dict:
    """The nested dict of a yaml (or json) merged over its `_BASE_` files, which are looked for beside it.

    Raises:
        CheckpointError: for something that is not such a file, or a base that is not there.
    """
    path = Path(path).resolve()
    if path in inside:
        raise CheckpointError(f"{path}: _BASE_ leads back to the file itself")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        hint = f": it is the _BASE_ of {inside[-1].name}; put it there, or use a resolved config" if inside else ""
        raise CheckpointError(f"{path} does not exist{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not yaml ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} contains no settings")
    base = tree.pop("_BASE_", None)
    return tree if base is None else _merge(read_yaml(path.parent / base, (*inside, path)), tree)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def settings_from_yaml(path: str | Path) -> Settings:
    """What a yaml of the original says about a checkpoint trained with it.

    Raises:
        CheckpointError: if it cannot be read, or describes another model.
    """
    tree = read_yaml(path)
    try:
        return _settings(path, tree)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a value is not of the kind that detectron2 has there ({error})") from error


def _settings(path: str | Path, tree: dict) -> Settings:
    model, inputs = tree.get("MODEL", {}), tree.get("INPUT", {})
    head, former = model.get("SEM_SEG_HEAD", {}), model.get("MASK_FORMER", {})
    usual, fixed = design_of_yaml(path, model)
    names = {
        "num_labels": head.get("NUM_CLASSES"),
        "feature_size": head.get("CONVS_DIM"),
        "mask_feature_size": head.get("MASK_DIM"),
        "encoder_layers": head.get("TRANSFORMER_ENC_LAYERS"),
        "common_stride": head.get("COMMON_STRIDE"),
        "ignore_value": head.get("IGNORE_VALUE"),
        "num_queries": former.get("NUM_OBJECT_QUERIES"),
        "hidden_dim": former.get("HIDDEN_DIM"),
        "decoder_layers": former.get("DEC_LAYERS"),
        "num_attention_heads": former.get("NHEADS"),
        "dim_feedforward": former.get("DIM_FEEDFORWARD"),
        "dropout": former.get("DROPOUT"),
        "pre_norm": former.get("PRE_NORM"),
        "enforce_input_projection": former.get("ENFORCE_INPUT_PROJ"),
        "no_object_weight": former.get("NO_OBJECT_WEIGHT"),
        "class_weight": former.get("CLASS_WEIGHT"),
        "mask_weight": former.get("MASK_WEIGHT"),
        "dice_weight": former.get("DICE_WEIGHT"),
        "train_num_points": former.get("TRAIN_NUM_POINTS"),
        "oversample_ratio": former.get("OVERSAMPLE_RATIO"),
        "importance_sample_ratio": former.get("IMPORTANCE_SAMPLE_RATIO"),
        "use_auxiliary_loss": former.get("DEEP_SUPERVISION"),
    }
    config = usual | {name: value for name, value in names.items() if value is not None}
    class_set = _class_set(_literal(tree.get("DATASETS", {}).get("TEST")))
    config["task"] = _task(former.get("TEST", {}), class_set)
    config |= {name: value for name, value in fixed.items() if value is not None}
    backbone = _backbone(model)
    if backbone["model_type"] == "resnet":
        config["freeze_batch_norm"] = model.get("RESNETS", {}).get("NORM", "FrozenBN") == "FrozenBN"
    shortest, longest = (
        inputs.get(key, default)
        for key, default in zip(("MIN_SIZE_TEST", "MAX_SIZE_TEST"), DEFAULT_TEST_SIZE, strict=True)
    )
    processor = {
        "size": {"shortest_edge": int(shortest), "longest_edge": int(longest)},
        "image_mean": [value / 255 for value in model.get("PIXEL_MEAN", DEFAULT_MEAN)],
        "image_std": [value / 255 for value in model.get("PIXEL_STD", DEFAULT_STD)],
    }
    for name in ("object_mask_threshold", "overlap_threshold"):
        if (value := former.get("TEST", {}).get(name.upper())) is not None:
            processor[name] = float(value)
    notes = []
    if inputs.get("FORMAT", "RGB") != "RGB":
        notes.append(f"INPUT.FORMAT is {inputs['FORMAT']}: give the processor images in that order of channels")
    video = "Video" in str(model.get("META_ARCHITECTURE"))
    return Settings(Path(path).name, config, backbone, processor, class_set, notes, video)


def _literal(value):
    """detectron2 reads strings such as '("coco_2017_val",)' as Python literals."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _class_set(test_sets) -> str | None:
    name = str(test_sets[0]) if isinstance(test_sets, list | tuple) and test_sets else str(test_sets)
    matches = [prefix for prefix in CLASS_SETS if name.startswith(prefix)]
    return CLASS_SETS[max(matches, key=len)] if matches else None


def _task(test: dict, class_set: str | None) -> str:
    """The class set's task (ADE20K's instance models have all three switches on), else by the switches."""
    if class_set is not None and class_set.rpartition("-")[2] in ("semantic", "instance", "panoptic"):
        return class_set.rpartition("-")[2]
    if test.get("PANOPTIC_ON", False):
        return "panoptic"
    return "instance" if test.get("INSTANCE_ON", False) else "semantic"


def _backbone(model: dict) -> dict:
    if "swin" in str(model.get("BACKBONE", {}).get("NAME", "")).lower():
        swin = model.get("SWIN", {})
        names = {
            "embed_dim": swin.get("EMBED_DIM"),
            "depths": _literal(swin.get("DEPTHS")),
            "num_heads": _literal(swin.get("NUM_HEADS")),
            "window_size": swin.get("WINDOW_SIZE"),
            "mlp_ratio": swin.get("MLP_RATIO"),
            "qkv_bias": swin.get("QKV_BIAS"),
            "use_absolute_embeddings": swin.get("APE"),
            "drop_path_rate": swin.get("DROP_PATH_RATE"),
            "image_size": swin.get("PRETRAIN_IMG_SIZE", 224),
        }
        return {"model_type": "swin"} | {name: value for name, value in names.items() if value is not None}
    resnet = model.get("RESNETS", {})
    depth = resnet.get("DEPTH", 50)
    if depth not in RESNET_DEPTHS:
        raise CheckpointError(f"MODEL.RESNETS.DEPTH is {depth}; known are {sorted(RESNET_DEPTHS)}")
    return {
        "model_type": "resnet",
        "depths": RESNET_DEPTHS[depth],
        "layer_type": "bottleneck" if depth >= 50 else "basic",
        "downsample_in_bottleneck": resnet.get("STRIDE_IN_1X1", True),
    }
