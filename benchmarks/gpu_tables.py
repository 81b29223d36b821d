"""Write the figures of docs/gpu/*.json into the tables of docs/kernels.md and docs/training.md.

    python benchmarks/gpu_tables.py [FOLDER]

A table stands between `<!-- gpu: NAME -->` and `<!-- end -->`; one whose figures are missing stays as it is.
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def operator(rows) -> list[list[str]]:
    rows = [row for row in rows if "seconds" in row]
    names = [name for name in ("stock", "formula", "original", "mmcv", "kernel") if name in rows[0]["seconds"]]
    labels = {"kernel": "triton", "original": "original's CUDA"}
    lines = [["image", "batch", "dtype", "pass", *(labels.get(name, name) for name in names), "stock / triton"]]
    lines[0] += ["original's / triton"] * ("original" in names) + ["GB/s", "of a copy's"]
    for row in rows:
        seconds = row["seconds"]
        times = [f"{1000 * seconds[name]:.2f}" if name in seconds else "–" for name in names]
        ratios = [
            f"**{seconds[name] / seconds['kernel']:.1f}**" if name in seconds else "–"
            for name in ("stock", "original")
            if name in names
        ]
        rate = row["bytes"] / seconds["kernel"]
        share = f"{rate / row['copy_bandwidth']:.0%}"
        lines.append(
            [row["image"], str(row["batch"]), row["dtype"], row["pass"], *times, *ratios, f"{rate / 1e9:.0f}", share]
        )
    return lines


def training(rows) -> list[list[str]]:
    lines = [["backbone", "images", "", "ms", "peak GB", "images/s", "times stock's speed", "of stock's memory"]]
    stock = {row["backbone"]: row for row in rows if row["variant"] == "stock" and row["seconds"]}
    for row in rows:
        images = f"{row['batch']} × {row['size']}²"
        if row["seconds"] is None:
            lines.append([row["backbone"], images, row["variant"], "out of memory", *[""] * 4])
            continue
        base = stock.get(row["backbone"])
        ratios = ["–", "–"]
        if base:
            ratios = [f"{base['seconds'] / row['seconds']:.2f}", f"{row['gigabytes'] / base['gigabytes']:.2f}"]
        rate = row["batch"] / row["seconds"]
        numbers = [f"{1000 * row['seconds']:.0f}", f"{row['gigabytes']:.1f}", f"{rate:.1f}"]
        lines.append([row["backbone"], images, row["variant"], *numbers, *ratios])
    return lines


def inference(rows) -> list[list[str]]:
    lines = [["backbone", "size", "batch", "dtype", "", "images/s", "times stock's speed"]]
    for row in rows:
        if "variant" in row:
            rate, size = row["batch"] / row["seconds"], f"{row['size']}²"
            settings = [row["backbone"], size, str(row["batch"]), row["dtype"], row["variant"]]
            lines.append([*settings, f"{rate:.1f}", f"{row['ratio']:.2f}"])
    return lines


def stages(rows) -> list[list[str]]:
    rows = [row for row in rows if "stages" in row]
    if not rows:
        return []
    names = list(rows[0]["stages"])
    lines = [["backbone", "size", *(f"{name}, ms" for name in names)]]
    for row in rows:
        times = [f"{1000 * row['stages'][name]:.1f}" for name in names]
        lines.append([row["backbone"], f"{row['size']}²", *times])
    return lines


def scenes(rows) -> list[list[str]]:
    lines = [["precision", "loss, first and last", "all finite", "PQ", "seconds"]]
    for row in rows:
        losses = f"{row['losses'][0]:.1f} → {row['losses'][-1]:.1f}"
        finite = "yes" if row["finite"] else "no"
        lines.append([row["precision"], losses, finite, f"{100 * row['pq']:.1f}", f"{row['seconds']:.0f}"])
    return lines


TABLES = {  # name of a table -> page, files of figures, and what makes lines of their rows
    "operator": ("kernels.md", ["operator"], operator),
    "training": ("training.md", ["training", "training_swin"], training),
    "scenes": ("training.md", ["scenes"], scenes),
    "inference": ("kernels.md", ["inference", "inference_compiled"], inference),
    "stages": ("kernels.md", ["inference"], stages),
}


def main(folder: Path):
    for name, (page, files, table) in TABLES.items():
        found = [folder / f"{file}.json" for file in files if (folder / f"{file}.json").exists()]
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        lines = table([row for content in contents for row in content["rows"]]) if contents else []
        if len(lines) < 2:
            print(f"{name}: no figures in {folder}")
            continue
        lines.insert(1, ["---"] * len(lines[0]))
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        text = f"{contents[0]['date']}, {contents[0]['machine']}.\n\n{text}"
        if folder.resolve() == (DOCS / "gpu").resolve():
            replace(DOCS / page, name, text)
        print(f"\n{name}: {text}")


def replace(page: Path, name: str, text: str):
    old = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- gpu: {name} -->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda match: f"{match[1]}\n{text}\n\n{match[2]}", old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page}: has {count} places for the table {name!r}, it must be one")
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "gpu")
