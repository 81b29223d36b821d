"""A checkpoint's README.md for the Hub, written from what is known about it."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..inference.known_labels import stuff_of, task_of
from ..model.channels import image_channels, model_channels
from ..model.design_rules import own_design
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation

LICENCES = {  # what a config's `weights_license` may name: title, where its text is, what it asks for
    "dinov3-license": (
        "Meta's DINOv3 License",
        "https://github.com/facebookresearch/dinov3/blob/main/LICENSE.md",
        "weights made of these stay under it, whoever passes them on includes its text, publications acknowledge it, "
        "and it excludes uses such as military ones",
    )
}
TAGS = ["mask2former", "mask2former_hf", "vision", "image-segmentation"]
INSTALL = "not on PyPI yet: `pip install .` in a clone, or `pip install git+` and its address"  # as in README.md
_ARGUMENTS = (
    "learning_rate backbone_multiplier layer_decay weight_decay max_grad_norm schedule milestones lr_scheduler_type "
    "warmup_steps optim per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs bf16 fp16 "
    "seed"
).split()


def write_model_card(
    model,
    directory: str | Path,
    processor=None,
    *,
    repo_id: str | None = None,
    dataset: str | None = None,
    metrics: Mapping | None = None,
    training_arguments=None,
    license: str | None = None,
    base_model: str | None = None,
    with_code: bool = False,
    parity: Mapping | None = None,
    unit: str | None = None,
) -> Path:
    """Write `directory/README.md`: metadata for the Hub, and text for people. What is not known is left out.

    Args:
        model: of images or of clips; gives task, classes, architecture and size.
        directory: created if it does not exist; a README.md there is overwritten.
        processor: gives the input size, and the stuff where the config does not say it.
        repo_id: "owner/name" on the Hub, used in the examples; by default the directory's name.
        dataset: what the model was trained and measured on; "owner/name" links the Hub's data set.
        metrics: {name: number} as from `evaluation.evaluator.headline`, or nested as from `evaluate`. Numbers are
            written as they are; what is no finite number is left out.
        training_arguments: `TrainingArguments`, of which what matters is listed, or a mapping, listed whole.
        license: of the weights, as the Hub spells it ("apache-2.0", "cc-by-nc-4.0", "other"); by default the one of
            `LICENCES` that the config's `weights_license` names, if the weights are made of such.
        base_model: id of the checkpoint that training started from.
        with_code: the checkpoint was saved by `save_with_code`.
        parity: the report of `mask2former-hf verify --json`.
        unit: of the metrics, such as "percent".

    Returns:
        The file's path.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = repo_id or directory.resolve().name
    figures, stuff = flatten(metrics or {}), stuff_of(model.config, processor)
    licence_name = None if license else model.config.weights_license
    inherited = LICENCES.get(licence_name)
    sections = [
        f"# {name.split('/')[-1]}",
        _introduction(model.config, base_model),
        _facts(model, processor, dataset, stuff),
        _results(figures, dataset, unit),
        _parity(parity),
        _usage(name, model.config, stuff, with_code, isinstance(model, Mask2FormerForVideoSegmentation)),
        _training(training_arguments),
        _classes(model.config, stuff),
        _licences(license, inherited, with_code),
    ]
    metadata = _metadata(
        name.split("/")[-1],
        dataset,
        figures,
        base_model=base_model,
        license="other" if inherited else license,
        license_name=licence_name if inherited else None,
        license_link=inherited[1] if inherited else None,
    )
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(directory / "README.md")
    return directory / "README.md"


def _metadata(name: str, dataset: str | None, figures: Mapping[str, float], **fields) -> ModelCardData:
    """What the Hub reads; a figure needs the data that it was measured on."""
    is_id = dataset is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) is not None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=TAGS,
        datasets=[dataset] if is_id else None,
        **fields,
    )
    if figures and dataset is not None:
        data.model_name = name
        data.eval_results = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=dataset if is_id else re.sub(r"\W+", "-", dataset.lower()).strip("-"),
                dataset_name=dataset,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in figures.items()
        ]
    return data


def flatten(metrics: Mapping) -> dict[str, float]:
    """{"pq": {"all": {"pq": 0.4}}} -> {"pq_all_pq": 0.4}; only finite numbers."""
    figures = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            figures |= {f"{name}_{inner}": number for inner, number in flatten(value).items()}
        elif hasattr(value, "__float__") and not isinstance(value, bool | str) and math.isfinite(float(value)):
            figures[str(name)] = float(value)
    return figures


def _introduction(config, base_model: str | None) -> str:
    origin = f", trained from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    return (
        f"A [Mask2Former](https://arxiv.org/abs/2112.01527) for {task_of(config)} segmentation{origin}. Written by "
        f"mask2former_hf {__version__}; transformers' own Mask2Former loads the same files."
    )


def _facts(model, processor, dataset: str | None, stuff: list[int] | None) -> str:
    config, backbone = model.config, model.config.backbone_config
    kinds = "" if stuff is None else f" ({config.num_labels - len(stuff)} things, {len(stuff)} stuff)"
    weights = [tensor for tensor in model.state_dict().values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    depths = getattr(backbone, "depths", None)
    rows = {
        "Task": task_of(config),
        "Data": dataset,
        "Classes": f"{config.num_labels}{kinds}",
        "Backbone": f"{backbone.model_type}{f', blocks {list(depths)}' if depths else ''}",
        "Queries": config.num_queries,
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M",
        "Weights": f"{size / 1e6:.1f} MB, {str(model.dtype).removeprefix('torch.')}",
        "Input": None if processor is None else _input(processor),
        "Deformable attention": "compiled for CPUs (C++) and NVIDIA GPUs (Triton) where mask2former_hf is installed, "
        "plain PyTorch elsewhere",
    }
    return _table(("", ""), [(name, value) for name, value in rows.items() if value is not None])


def _input(processor) -> str:
    size = {side: length for side, length in dict(processor.size).items() if length is not None}
    text = ", ".join(f"{side.replace('_', ' ')} {length}" for side, length in size.items())
    channels = image_channels(processor)
    return text if channels is None else f"{channels} bands, times {processor.rescale_factor:.4g}; {text}"


def _results(figures: Mapping[str, float], dataset: str | None, unit: str | None) -> str:
    if not figures:
        return ""
    where = f" on {dataset}" if dataset else ""
    rows = [(metric, f"{value:.4g}") for metric, value in figures.items()]
    return f"## Results{where}\n\n" + _table(("metric", f"value in {unit}" if unit else "value"), rows)


def _parity(parity: Mapping | None) -> str:
    if not parity:
        return ""
    hidden = ("checkpoint", "metrics")  # the first may be a path on someone's machine
    rows = [(name.replace("_", " "), _shown(value)) for name, value in parity.items() if name not in hidden]
    text = "Logits of mask2former_hf and of transformers' Mask2Former on the same inputs (`mask2former-hf verify`)."
    parts = [f"## The same in transformers\n\n{text}", _table(("", ""), rows)]
    ours, stock = (flatten(parity.get("metrics", {}).get(name, {})) for name in ("ours", "stock"))
    if ours.keys() & stock.keys():
        rows = [(name, f"{value:.4g}", f"{stock[name]:.4g}") for name, value in ours.items() if name in stock]
        parts.append(_table(("metric", "mask2former_hf", "transformers"), rows))
    return "\n\n".join(parts)


def _usage_of_bands(name: str, channels: int) -> str:
    return f"""## Use

Images have {channels} bands in the order of the training data: a TIFF of so many bands, an array of NumPy (.npy), or
an array (height, width, {channels}). With the package mask2former_hf ({INSTALL}):

```python
from mask2former_hf import Segmenter

result = Segmenter("{name}")("image.tif")
result.plot("image.tif", show_bands={[1, 2, 3] if channels > 2 else [1]}).save("segments.png")
```

transformers' own Mask2Former loads the weights; its image processor, with Pillow, resizes no bands, so prepare
`pixel_values` with this package's `Mask2FormerImageProcessor`."""


def _usage(name: str, config, stuff: list[int] | None, with_code: bool, of_clips: bool = False) -> str:
    if model_channels(config) != 3:
        return _usage_of_bands(name, model_channels(config))
    video = (
        f"""
This is a model of clips, in which an object is followed through the frames; what stands below takes single frames.

```python
from mask2former_hf import VideoSegmenter

for frame in VideoSegmenter("{name}")(frames):  # any iterable of images
    print([(segment.id, segment.label) for segment in frame.segments])
```
"""
        if of_clips
        else ""
    )
    in_less_time = (
        f"""
It was trained to answer with fewer layers of its encoder, too: `Segmenter("{name}", effort=0.5)` takes half of them.
"""
        if config.encoder_exits and not of_clips
        else ""
    )
    code = (
        f"""
This checkpoint carries the code of mask2former_hf. Without installing it:

```python
from transformers import pipeline

pipe = pipeline("image-segmentation", model="{name}", trust_remote_code=True)
segments = pipe("photo.jpg", subtask="{task_of(config)}")
```
"""
        if with_code
        else ""
    )
    return f"""## Use

With the package mask2former_hf ({INSTALL}), which gives the results of the paper's code:
{video}
```python
from mask2former_hf import Segmenter

result = Segmenter("{name}")("photo.jpg")
result.plot("photo.jpg").save("segments.png")
```
{in_less_time}{code}
{_with_stock(name, config, stuff)}"""


def _with_stock(name: str, config, stuff: list[int] | None) -> str:
    """How transformers' own class runs the checkpoint, or why it does not."""
    if own := own_design(config):
        return (
            f"transformers' own class has no {', '.join(f'`{field}`' for field in own)}: this checkpoint needs the "
            "package, or `trust_remote_code=True` where it carries its code."
        )
    post_process = f"post_process_{task_of(config)}_segmentation"
    stuff = stuff if task_of(config) == "panoptic" else None
    if stuff == list(range(config.num_labels))[-len(stuff or ()) :]:
        stuff = f", label_ids_to_fuse=set(range({stuff[0]}, {config.num_labels}))"  # COCO's 53
    else:
        stuff = f", label_ids_to_fuse={{{str(stuff)[1:-1]}}}" if stuff else ""
    return f"""With transformers alone:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

processor = AutoImageProcessor.from_pretrained("{name}")
model = Mask2FormerForUniversalSegmentation.from_pretrained("{name}")
image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.{post_process}(
    outputs, target_sizes=[(image.height, image.width)]{stuff}
)[0]
```"""


def _training(arguments) -> str:
    if arguments is None:
        return ""
    if not isinstance(arguments, Mapping):
        given = {name: getattr(arguments, name, None) for name in _ARGUMENTS}
        arguments = {name: value for name, value in given.items() if value not in (None, False)}
        if arguments.get("max_steps", -1) > 0:
            arguments.pop("num_train_epochs", None)
        else:
            arguments.pop("max_steps", None)
        if arguments.get("schedule", "trainer") != "trainer":
            arguments.pop("lr_scheduler_type", None)
    return "## Training\n\n" + _table(("argument", "value"), [(name, _shown(v)) for name, v in arguments.items()])


def _classes(config, stuff: list[int] | None) -> str:
    rows = [
        (label, config.id2label[label], "stuff" if label in (stuff or ()) else "thing")
        for label in sorted(config.id2label)
    ]
    header = ("label", "name", "kind")
    if stuff is None:
        header, rows = header[:2], [row[:2] for row in rows]
    return f"## Classes\n\n<details><summary>{len(rows)} classes</summary>\n\n{_table(header, rows)}\n\n</details>"


def _licences(license: str | None, inherited: tuple[str, str, str] | None, with_code: bool) -> str:
    weights = f"`{license}`" if license else "not stated by who published them; ask before using them"
    if inherited:
        title, link, meaning = inherited
        weights = f"[{title}]({link}): {meaning}"
    code = "The Python files of this checkpoint are Apache-2.0 (mask2former_hf)." if with_code else ""
    return f"## Licence\n\nWeights: {weights}. Code (mask2former_hf): Apache-2.0. {code}".rstrip()


def _shown(value) -> str:
    value = getattr(value, "value", value)  # enumerations of TrainingArguments
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(header: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Markdown; a bar in a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", str(c)).replace("|", "\\|") for c in line) + " |" for line in lines
    )
