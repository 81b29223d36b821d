"""Generated videos in the form of YouTube-VIS."""

import json

from PIL import Image

from mask2former_hf.model.run_lengths import mask_to_rle


def write_youtube_vis(videos, folder):
    """A folder of frames and a json of `MovingScenes`; as flags' ends."""
    content = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": n + 1, "name": name} for n, name in videos.classes.id2label.items()],
    }
    for video in videos:
        (folder / "frames" / str(video.id)).mkdir(parents=True)
        names = [f"{video.id}/{frame}.png" for frame in range(video.length)]
        for frame, name in enumerate(names):
            Image.fromarray(video.frame(frame)).save(folder / "frames" / name)
        height, width = video.size
        content["videos"].append({"id": video.id, "file_names": names, "height": height, "width": width})
        for thing in video.objects:
            masks = [None if mask is None else mask_to_rle(mask) for mask in thing.segmentations]
            entry = {"video_id": video.id, "category_id": thing.label + 1, "segmentations": masks}
            content["annotations"].append(entry | {"id": len(content["annotations"])})
    (folder / "instances.json").write_text(json.dumps(content))
    return {"images": folder / "frames", "annotations": folder / "instances.json"}
