"""The flag for where a network runs."""

import argparse


def add_device_argument(parser: argparse.ArgumentParser, usual: str = "cuda if it is there, else cpu"):
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1, ... (default: {usual})")
