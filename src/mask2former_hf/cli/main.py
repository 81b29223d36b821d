"""Entry point of `mask2former-hf`: finds the subcommand and turns errors into one clear line."""

import argparse
import contextlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterable

from ..data.errors import DataError
from .signals import Ended, unwound_by_signals

COMMANDS = {
    "app": "segment images on a page in the browser, here or as a Space of the Hub",
    "convert": "turn a checkpoint of detectron2 or mmdetection into a folder for this package, and back",
    "convert-data": "turn annotated images from one format into another: COCO, YOLO, labelme, maps, ...",
    "demo": "train a small model on generated scenes, evaluate it, and draw its predictions",
    "doctor": "say what is wrong with data, a checkpoint or a run, and what mends it",
    "evaluate": "measure a checkpoint on annotated images: panoptic quality, average precision, mean IoU",
    "env": "print versions, devices, and which kernel runs for each device and dtype",
    "export": "write a checkpoint as ONNX graphs that run without torch, for OpenVINO, or as a PyTorch program",
    "predict": "segment images with a checkpoint",
    "train": "fine-tune or train a model on your own data",
    "verify": "compare a checkpoint here and in stock transformers: logits, speed, and metrics on a data set",
}


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


def in_flags(text: str, names: Iterable[str]) -> str:
    """An error that names settings as `name=value` or `name=`, in the words of the command line: `--name value`."""
    one_of = "|".join(sorted(names, key=len, reverse=True))
    text = re.sub(rf"(?<![\w-])({one_of})=(True\b)?", lambda found: f"--{found[1].replace('_', '-')} ", text)
    return re.sub(r"(--[a-z-]+) (?=[ ,;:.)]|$)", r"\1", text)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 1 a fault of this package, 2 the user's input did not work, 130 interrupted, 143 ended
        by SIGTERM.
    """
    # Torch's threads otherwise wait for each other by spinning, which keeps the one that is waited for from
    # running. With two threads on 2 cores under a load of 9 to 14, 10 steps of the tiny model at 256 x 256 took
    # 208 s, and 23 s so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    parser = argparse.ArgumentParser(
        prog="mask2former-hf", description="Mask2Former for the Hugging Face ecosystem", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if arguments[:1] == [name]:  # only the chosen command is imported: torch takes seconds
            try:
                module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
            except ModuleNotFoundError as error:  # of an installation without requirements, for exported folders
                print(
                    f"mask2former-hf {name}: {error}; without it only `predict` works, with the folder of an export",
                    file=sys.stderr,
                )
                return 2
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser)
    parsed = parser.parse_args(arguments)
    try:
        with unwound_by_signals():
            return parsed.run(parsed) or 0
    except UserError as error:
        print(f"mask2former-hf {parsed.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"mask2former-hf {parsed.command}: interrupted", file=sys.stderr)
        return 130
    except Ended as error:
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(f"mask2former-hf {parsed.command}: ended by {error.name}", file=sys.stderr)
        return error.code
    except Exception as error:
        return _report(parsed.command, error)


def _report(command: str, error: Exception) -> int:
    """One line where data or the system stopped the command, as a full disk does; else a traceback to be sent."""
    if isinstance(error, DataError):
        print(f"mask2former-hf {command}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno is not None:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"mask2former-hf {command}: {place}{error.strerror}", file=sys.stderr)
        return 2
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's; torch is slow to import
        reason = (str(error).splitlines() or ["no more memory"])[0]
        print(f"mask2former-hf {command}: {reason} Use smaller images or batches.", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        f"mask2former-hf {command}: this is a fault of mask2former-hf. Please report it, with the lines above, the "
        "command, and what `mask2former-hf env` prints.",
        file=sys.stderr,
    )
    return 1
