"""What `train` shows of a run on videos: a summary before it starts, and the first clips."""

from PIL import Image

from ..data.clips import NO_LABEL, Clip
from ..inference.drawing import draw_instances
from ..training.video_run import VideoRun
from .training_output import in_a_row, recipe_lines


def summary(run: VideoRun) -> str:
    """What will be trained on what, before anything long starts."""
    clips = run.augmented.recipe
    lines = [f"nothing to measure on was given: held out are {run.held_out}"] if run.held_out else []
    lines += [
        run.train_data.classes.format_table(),
        f"{len(run.train_data)} videos to train on, of at most {run.most} objects; {len(run.val_data)} to measure",
        f"clips of {clips.frames} frames, at most {clips.frame_range} from the first, short sides "
        f"{', '.join(map(str, clips.short_sides))}",
        *recipe_lines(run, "clips"),
    ]
    return "\n".join(lines)


def draw_clips(clips: list[Clip], id2label) -> Image.Image:
    """A row per clip: its frames with the masks."""
    names = dict(id2label) | {NO_LABEL: "(class not told)"}
    rows = [
        in_a_row(
            [draw_instances(x, clip.masks[:, t], clip.labels.tolist(), None, names) for t, x in enumerate(clip.frames)]
        )
        for clip in clips
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
