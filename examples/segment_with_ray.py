"""Segment images with Ray Data, on this machine or on a cluster: Parquet files with a row for each segment.

python examples/segment_with_ray.py CHECKPOINT photos/ segments/ [--workers 2] [--gpus-each 1]
"""

import argparse

import pyarrow
import ray

from mask2former_hf import Segmenter


class Segment:
    """One of these lives in each worker and keeps the model."""

    def __init__(self, checkpoint: str, **numbers):
        self.segmenter, self.numbers = Segmenter(checkpoint), numbers

    def __call__(self, batch: dict) -> pyarrow.Table:
        columns = self.segmenter.on_batch(batch, image="bytes", image_id="path", **self.numbers)
        return pyarrow.table(columns, schema=self.segmenter.batch_schema())


def main(checkpoint: str, images: str, output: str, workers: int = 1, gpus_each: float = 0, **numbers):
    files = ray.data.read_binary_files(images, include_paths=True)
    segments = files.map_batches(
        Segment,
        fn_constructor_args=(checkpoint,),
        fn_constructor_kwargs=numbers,
        batch_size=32,
        concurrency=workers,
        num_gpus=gpus_each,
    )
    segments.write_parquet(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus-each", type=float, default=0)
    main(**vars(parser.parse_args()))
