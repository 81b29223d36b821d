"""The README.md of an export: what is in the folder, how it is run, and what was checked."""

from pathlib import Path

from ..inference.exported import LOGITS
from ..model.channels import model_channels
from .tracing import WEIGHTS

RESULTS = {
    "panoptic": "`segmentation` (height, width) int32 ids from 1, 0 for void; `segment_labels`, `segment_scores`, "
    "`segment_areas`, one entry per id",
    "instance": "`masks` (N, height, width) bool, `scores`, `labels`, `boxes` (left, top, right, bottom), best first; "
    "`segmentation` (height, width) int32, the best instance at each pixel, from 1",
    "semantic": "`segmentation` (height, width) int32 labels",
}


def write_card(folder: Path, config, report: dict):
    beside = [path.name for path in sorted(folder.glob(f"*.onnx{WEIGHTS}"))]
    (folder / "README.md").write_text(_card(config, report, beside), encoding="utf-8")


def _card(config, report: dict, beside: list[str]) -> str:
    task, size = report["task"], report["size"]
    sizes = "any multiples of 32" if size is None else f"{size[0]} x {size[1]}"
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    rows = [
        ("Task", task or f"{config.task}; logits, and the rules of every task as a graph of its own"),
        ("Classes", len(config.id2label)),
        ("Backbone", config.backbone_config.model_type),
        ("Weights", report["dtype"]),
        ("Opset", report["opset"]),
        ("Height and width", sizes),
        ("Written by", versions),
    ]
    checked = [
        (runtime, " x ".join(map(str, row["input"])), *(f"{row[output]:.1e}" for output in LOGITS))
        for runtime, name in (("ONNX Runtime", "differences"), ("OpenVINO", "openvino"))
        for row in report.get(name, ())
    ]
    runtime = "openvino" if "openvino" in report else "onnxruntime"
    return f"""# An exported Mask2Former

{_table(("", ""), rows)}

## Files

{chr(10).join(_files(config, report, beside))}
* `config.json`, `preprocessor_config.json`: classes, and what is done to an image.

## Use

Without torch (`pip install --no-deps` of mask2former_hf, and {runtime}, numpy, pillow):

```python
from mask2former_hf import Segmenter

result = Segmenter("FOLDER")("photo.jpg")
```

## Checked

Largest difference of the logits to the checkpoint, in units of the largest, for noise of these shapes:

{_table(("runtime", "pixel_values", "class logits", "mask logits"), checked)}
"""


def _files(config, report: dict, beside: list[str]) -> list[str]:
    task = report["task"]
    outputs = f"{RESULTS[task]}; and the logits" if task else "`class_queries_logits`, `masks_queries_logits`"
    files = [
        f"* `model.onnx`: `pixel_values` (batch, {model_channels(config)}, height, width), as "
        "`preprocessor_config.json` makes them"
    ]
    if task:
        files[0] += (
            "; `image_size` (rows, columns) of the image in there, `target_size` of the result; for one image. "
            "`stuff`, `threshold`, `mask_threshold` and `overlap_threshold` have defaults"
        )
    files[0] += f". Gives {outputs}."
    files += [f"* `{name}`: weights that `{name.removesuffix(WEIGHTS)}` looks for beside it." for name in beside]
    if "openvino" in report:
        files.append(
            "* `model.xml`, `model.bin`: `model.onnx` in OpenVINO's form, fastest if compiled for one shape; no input "
            "has a default."
        )
    if not task:
        files += [f"* `{own}.onnx`: from the logits of one image: {text}." for own, text in RESULTS.items()]
    return files


def _table(head: tuple, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
