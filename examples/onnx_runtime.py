"""A photo through an exported graph with onnxruntime alone: what to write in another language.

mask2former-hf export CHECKPOINT --task panoptic --output DIR; python examples/onnx_runtime.py DIR photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main(folder, photo):
    fields = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    names = json.loads((Path(folder) / "config.json").read_text())["id2label"]
    image = Image.open(photo).convert("RGB")
    size = fields["size"]
    if size.get("height"):  # of every image, whatever its proportions
        sides = size["width"], size["height"]
    else:
        scale = min(size["shortest_edge"] / min(image.size), size["longest_edge"] / max(image.size))
        sides = [int(side * scale + 0.5) for side in image.size]
    resized = image.resize(sides, Image.Resampling.BILINEAR)
    pixels = (np.asarray(resized) / 255 - fields["image_mean"]) / fields["image_std"]
    rows, columns = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, -rows % 32), (0, -columns % 32), (0, 0)))  # with zeros, to multiples of 32
    graph = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"))
    inputs = {
        "pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32),
        "image_size": np.array([rows, columns]),
        "target_size": np.array(image.size[::-1]),
    }
    outputs = ["segmentation", "segment_labels", "segment_scores", "segment_areas"]
    ids, *columns = graph.run(outputs, inputs)
    for number, (label, score, area) in enumerate(zip(*columns, strict=True), start=1):
        print(f"{number}: {names[str(label)]} {score:.2f}, {area} pixels")
    return ids  # (height, width), 0 is void


if __name__ == "__main__":
    main(*sys.argv[1:])
