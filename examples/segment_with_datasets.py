"""Segment the images of a data set with `datasets.Dataset.map`: a table with a row for each segment.

    python examples/segment_with_datasets.py CHECKPOINT "photos/*.jpg" segments.parquet [--num-proc 2]

On CPUs each process computes in one thread: give as many processes as there are cores.
"""

import argparse
import glob

import datasets

from mask2former_hf import Segmenter


def main(checkpoint: str, pattern: str, output: str, num_proc: int | None = None, **numbers):
    segmenter = Segmenter(checkpoint)  # travels to the processes by the checkpoint's name
    paths = sorted(glob.glob(pattern))
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
    segments = images.map(
        segmenter.on_batch,
        batched=True,
        batch_size=32,
        num_proc=num_proc,
        remove_columns=images.column_names,
        features=datasets.Features.from_arrow_schema(segmenter.batch_schema()),
        fn_kwargs=numbers,
    )
    segments.to_parquet(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("pattern")
    parser.add_argument("output")
    parser.add_argument("--num-proc", type=int)
    main(**vars(parser.parse_args()))
