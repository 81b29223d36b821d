"""Segment images with Spark: Parquet files with a row for each segment.

    spark-submit examples/segment_with_spark.py CHECKPOINT "photos/*.jpg" segments/

Every executor needs this package and the checkpoint at the same path, or a Hub id. PYSPARK_PYTHON names its Python.
"""

import argparse
from collections.abc import Iterator

import pandas
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from mask2former_hf import Segmenter


def main(checkpoint: str, pattern: str, output: str, **numbers):
    segmenter = Segmenter(checkpoint)  # travels by the checkpoint's name; a Python worker loads the weights once

    def segment(frames: Iterator[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        for frame in frames:
            yield pandas.DataFrame(segmenter.on_batch(frame, image="content", image_id="path", **numbers))

    spark = SparkSession.builder.appName("segment").getOrCreate()
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 32)  # images, of 10,000: they are held in memory
    images = spark.read.format("binaryFile").load(pattern)
    images.mapInPandas(segment, from_arrow_schema(segmenter.batch_schema())).write.parquet(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("pattern")
    parser.add_argument("output")
    main(**vars(parser.parse_args()))
