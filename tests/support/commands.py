"""Commands of the command line as functions, for tests of several files."""

from mask2former_hf.cli.main import main


def convert(*arguments):
    return main(["convert", *map(str, arguments)])
