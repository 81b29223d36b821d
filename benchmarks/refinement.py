"""What refines a result: Otsu, CRF, test-time augmentation and distillation, measured.

    python benchmarks/refinement.py refine --data camvid --data-root DATA [--steps 4000] [--width 64] [--limit N]
    python benchmarks/refinement.py refine --data nuclei --data-root DATA
    python benchmarks/refinement.py distillation --data scenes [--teacher-steps 4000] [--steps 1000] [--seeds 0 1 2]
    python benchmarks/refinement.py distillation --data camvid --data-root DATA

DATA holds `camvid/` and `nuclei_dsb2018/`; models are trained from scratch, so only differences count. Every run is
kept in `--output`: a call that was stopped goes on where it was, one with other seeds adds to what is there (for other
widths, weights or rates give another folder). Writes `<experiment>_<data>.json`, a bar chart and pictures beside it,
and prints a table in Markdown.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from common import machine
from PIL import Image, ImageDraw, ImageFont
from refinement_runs import Data, config, train
from tqdm import tqdm

from mask2former_hf import Mask2FormerForUniversalSegmentation
from mask2former_hf.evaluation.average_precision import AveragePrecision
from mask2former_hf.evaluation.boundary_iou import MeanBoundaryIoU
from mask2former_hf.evaluation.mean_iou import MeanIoU
from mask2former_hf.evaluation.panoptic_quality import PanopticQuality
from mask2former_hf.evaluation.truth import label_map, single_map, true_objects
from mask2former_hf.inference.drawing import draw_semantic, side_by_side
from mask2former_hf.inference.segmenter import Segmenter

VARIANTS = {  # data -> (task, refine, tta)
    "camvid": [
        ("semantic", None, False),
        ("semantic", "crf", False),
        ("semantic", None, True),
        ("semantic", "crf", True),
        ("panoptic", None, False),
        ("panoptic", "otsu", False),
        ("panoptic", "crf", False),
    ],
    "nuclei": [("instance", None, False), ("instance", "otsu", False), ("instance", "crf", False)]
    + [("instance", None, True)],
    "scenes": [("panoptic", None, False)],
}
THRESHOLD = {"semantic": None, "panoptic": 0.5, "instance": 0.05}
FOREGROUND_SCORE = 0.5  # of the instances whose union is the label map of nuclei


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("refine", "distillation"))
    parser.add_argument("--data", choices=tuple(VARIANTS), required=True)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("refinement_runs"))
    parser.add_argument("--steps", type=int, default=1000, help="of the model measured, or the student")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--width", type=int, default=64, help="channels of the model measured, or the teacher")
    parser.add_argument("--student-width", type=int, default=32)
    parser.add_argument("--distillation-weight", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="validation images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--model", help="refine: a checkpoint to measure instead of training one")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = Data(arguments.data, arguments.data_root)
    rows = {"refine": refine, "distillation": distillation}[arguments.experiment](data, arguments)
    name = f"{arguments.experiment}_{arguments.data}"
    settings = {key: str(value) for key, value in vars(arguments).items()}
    report = {"machine": machine(), "settings": settings, "rows": rows}
    (arguments.output / f"{name}.json").write_text(json.dumps(report, indent=2))
    chart(rows, arguments.output / f"{name}.png")
    print_table(rows)


def refine(data: Data, arguments) -> dict:
    """Every refinement of the same models' results, mean over the seeds."""
    rows = {}
    for seed in arguments.seeds:
        folder = arguments.output / f"{data.name}_width{arguments.width}_steps{arguments.steps}_seed{seed}"
        if arguments.model:
            folder = arguments.output / Path(arguments.model).name
            folder.mkdir(exist_ok=True)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(arguments.model).to(arguments.device).eval()
        else:
            model = train(folder, data, config(data, arguments.width), arguments.steps, seed, arguments)
        for task, method, tta in VARIANTS[data.name]:
            name = f"{task}, {method or 'plain'}{', tta' if tta else ''}"
            pictures = arguments.output / f"pictures_{data.name}" if seed == arguments.seeds[0] else None
            figures = measured(folder, model, data, arguments, (task, method, tta), pictures)
            rows.setdefault(name, []).append(figures)
        if arguments.model:
            break
    return rows


def distillation(data: Data, arguments) -> dict:
    """A student with labels, with labels and teacher, and with the teacher alone, for the same number of steps."""
    teacher_folder = arguments.output / f"{data.name}_teacher_steps{arguments.teacher_steps}"
    teacher = train(teacher_folder, data, config(data, arguments.width), arguments.teacher_steps, 1000, arguments)
    variant = VARIANTS[data.name][0]
    rows = {"teacher": [measured(teacher_folder, teacher, data, arguments, variant)]}
    kinds = {"labels": (None, True), "labels and teacher": (teacher, True), "teacher alone": (teacher, False)}
    for seed in arguments.seeds:
        for name, (teaches, labelled) in kinds.items():
            folder = arguments.output / f"{data.name}_student_{slug(name)}_steps{arguments.steps}_seed{seed}"
            student = config(data, arguments.student_width)
            model = train(folder, data, student, arguments.steps, seed, arguments, teaches, labelled)
            rows.setdefault(f"student, {name}", []).append(measured(folder, model, data, arguments, variant))
    return rows


def measured(folder: Path, model, data: Data, arguments, variant, pictures: Path | None = None) -> dict:
    """Figures of a model, from the run's folder if they were measured before."""
    task, method, tta = variant
    path = folder / f"{task}_{method}_{'tta' if tta else 'once'}_{arguments.limit or 'all'}.json"
    if not path.is_file():
        path.write_text(json.dumps(measure(model, data, arguments.limit, variant, pictures)))
    return json.loads(path.read_text())


def measure(model, data: Data, limit: int | None, variant, pictures: Path | None) -> dict:
    task, method, tta = variant
    labels = {0: "background", 1: "nucleus"} if data.name == "nuclei" else data.labels
    categories = {label: {"name": name, "isthing": label not in data.stuff} for label, name in labels.items()}
    void = len(categories)
    known = categories | {void: {"name": "void"}}  # predicted in panoptic results: a miss of the true class
    ious = MeanIoU(known, ignore_index=None), MeanBoundaryIoU(known, ignore_index=None)
    if data.name != "nuclei":
        ious = MeanIoU(known, ignore_index=255), MeanBoundaryIoU(known, ignore_index=255)
    precision = AveragePrecision({0: {"name": "nucleus"}}, "segm")
    quality = PanopticQuality(categories)
    count, seconds = min(limit or len(data.val), len(data.val)), 0.0
    segmenter = Segmenter.of(model, data.processor, task=task, refine=method, tta=tta)
    options = {"threshold": THRESHOLD[task], "stuff_label_ids": data.stuff}
    for index in tqdm(range(count), desc=f"{task} {method} {'tta' if tta else ''}", leave=False):
        example = data.val[index]
        start = time.perf_counter()
        result = segmenter(example.image, **options)
        seconds += time.perf_counter() - start
        if task == "instance":
            scores, labels = (np.array([getattr(s, name) for s in result.segments]) for name in ("score", "label_id"))
            precision.update(result.masks, scores, labels, true_objects(example, set()), image_id=index)
            predicted = result.masks[scores >= FOREGROUND_SCORE].any(0).astype(np.int64)
            truth = (single_map(example, "iou") > 0).astype(np.int64)
        else:
            truth, predicted = label_map(example, 255), result.map
        if task == "panoptic":
            table = np.full(len(result.segments) + 1, void)
            for segment in result.segments:
                table[segment.id] = segment.label_id
            predicted = table[result.map]
            rows = [{"id": s.id, "category_id": s.label_id} for s in result.segments]
            quality.update(result.map, rows, single_map(example, "pq"), example.segments)
        for metric in ious:
            metric.update(predicted, truth)
        if pictures is not None and index < 4:
            pictures.mkdir(exist_ok=True)
            panels = [Image.fromarray(example.image)]
            panels += [draw_semantic(example.image, which, known_names(known)) for which in (truth, predicted)]
            title = f"{task}, {method or 'plain'}{', tta' if tta else ''}"
            sheet = side_by_side(panels, ["image", "truth", title])
            sheet.save(pictures / f"{index}_{slug(title)}.png")
    figures = {"mIoU": ious[0].compute()["mIoU"], "boundary IoU": ious[1].compute()["mean_boundary_iou"]}
    if task == "instance":
        summary = precision.compute()
        figures |= {name: summary[name] for name in ("AP", "AP50", "APs")}
    if task == "panoptic":
        figures["PQ"] = quality.compute()["all"]["pq"]
    return {name: float(value) for name, value in figures.items()} | {"seconds per image": seconds / count}


def slug(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def known_names(known) -> dict[int, str]:
    return {label: category["name"] for label, category in known.items()}


def print_table(rows: dict[str, list[dict]]):
    names = list(dict.fromkeys(name for runs in rows.values() for name in runs[0]))
    print("| | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for row, runs in rows.items():
        print(f"| {row} | " + " | ".join(cell(runs, name) for name in names) + " |")


def cell(runs: list[dict], name: str) -> str:
    if name not in runs[0]:
        return ""
    values = [run[name] * (1 if "seconds" in name else 100) for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def chart(rows: dict[str, list[dict]], path: Path):
    """A bar per row and figure, with the spread over the seeds as a line, figures in percent."""
    names = [name for name in dict.fromkeys(n for runs in rows.values() for n in runs[0]) if "seconds" not in name]
    bar, left, font = 18, 240, ImageFont.load_default(size=14)
    height = sum((bar + 4) * sum(name in runs[0] for runs in rows.values()) + 44 for name in names)
    sheet = Image.new("RGB", (left + 560, height + 10), "white")
    pen, top = ImageDraw.Draw(sheet), 8
    for name in names:
        pen.text((10, top), name, font=ImageFont.load_default(size=18), fill="black")
        top += 28
        for row, runs in rows.items():
            if name not in runs[0]:
                continue
            values = [100 * run[name] for run in runs]
            mean = statistics.mean(values)
            pen.text((10, top), row, font=font, fill="black")
            pen.rectangle((left, top, left + 4 * mean, top + bar), fill=(90, 130, 190))
            middle = top + bar // 2
            pen.line((left + 4 * min(values), middle, left + 4 * max(values), middle), fill="black", width=2)
            pen.text((left + 4 * max(values) + 8, top), f"{mean:.2f}", font=font, fill="black")
            top += bar + 4
        top += 16
    sheet.save(path)


if __name__ == "__main__":
    main()
