"""Runs the code blocks of Markdown pages as a reader would, in a folder that has what the pages name.

`python` blocks of a page share a namespace; `bash` blocks run line by line in this process, by the same functions as
the installed command. Checkpoints of the Hub are folders of that name in the working folder, with tiny random models.
A block below `<!-- not run: REASON -->` is only looked at: flags go through the command's parser.
"""

import argparse
import configparser
import importlib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from torch.distributed.run import get_args_parser

from mask2former_hf.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^(?:<!-- not run: (.*?) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(mask2former-hf|torchrun|pip|python) ", re.MULTILINE)
# What makes a run long is made short; everything else is run as it is written.
SHORT = {
    "train": {"--epochs": "--steps=1", "--steps": "--steps=1", "--crop": "--crop=64", "--test-size": "--test-size=64"},
    "predict": {"--num-shards": "--num-shards=4"},
}
SHORT_IN_PYTHON = (re.compile(r"\b(?:epochs|steps)=\d+"), "steps=1, crop=64, cpu=True")


class Block(NamedTuple):
    """Code of a page; `reason` says why it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """Every block of a page that is code."""
    return [block for block in _all_blocks(page) if block.language in ("python", "bash")]


def unmarked_commands(page: Path) -> list[str]:
    """Where commands stand in a block that does not say it is bash, and would never be run."""
    others = [block for block in _all_blocks(page) if block.language not in ("python", "bash")]
    return [f"{page.relative_to(ROOT)}:{block.line}" for block in others if _COMMAND.search(block.text)]


def _all_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(match[2], match[3], text[: match.start(3)].count("\n") + 1, match[1]) for match in _BLOCK.finditer(text)
    ]


def run_page(page: Path):
    """Run all blocks of a page in the working folder.

    Raises:
        Exception: of a Python block, its line being that of the page.
        AssertionError: of a command that fails, or that nothing here can run.
    """
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.reason is not None:
            continue
        if block.language == "python":
            pattern, short = SHORT_IN_PYTHON
            code = "\n" * (block.line - 1) + pattern.sub(short, block.text)
            exec(compile(code, str(page), "exec"), namespace)
        else:
            for words in commands(os.path.expandvars(block.text)):
                run_command(words, where)


def check_block(block: Block):
    """What can be said of commands without running them.

    Raises:
        AssertionError, SystemExit: for flags that a command does not have, and scripts and extras that are not there.
    """
    assert block.language == "bash", "a python block is run, on something small that the test has"
    for words in commands(block.text):
        if words[:2] == ["pip", "install"]:
            check_extras(words[2:])
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text()
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in script, f"{words[1]} has no {flag}"
        elif words[0] == "mask2former-hf":
            parser = argparse.ArgumentParser(prog=" ".join(words[:2]), allow_abbrev=False)
            assert words[1] in COMMANDS, f"{words[1]}: no command"
            importlib.import_module(f"mask2former_hf.cli.{words[1].replace('-', '_')}").add_arguments(parser)
            parser.parse_args(words[2:])


def commands(text: str):
    """Words of every command; lines that end in a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words: list[str], where: str):
    if words[:2] == ["pip", "install"]:
        check_extras(words[2:])
        return
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module and parsed.training_script == "mask2former_hf", f"{where}: {words}"
        words = ["mask2former-hf", *parsed.training_script_args]
    assert words[0] == "mask2former-hf", f"{where}: nothing here runs {words[0]}"
    assert main(shortened(words[1:])) == 0, f"{where}: {shlex.join(words)}"


def shortened(arguments: list[str]) -> list[str]:
    """A command as it is, but training is of one small step on the CPU, and shards are as few as images.

    Of videos there is no crop; a recipe has steps of its own.
    """
    result, replaced, short = [], False, SHORT.get(arguments[0], {})
    for word in arguments:
        if word.startswith("--"):
            replaced = word in short
            result.append(short.get(word, word))
        elif not replaced:
            result.append(word)
    if arguments[0] == "train":
        result += ["--steps=1", "--batch-size=2", "--cpu"]
        result += [] if "youtube-vis" in arguments else [short["--crop"]]
    return result


def check_extras(words: list[str]):
    """Extras that a page tells to install exist."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        missing = set(extras.split(",")) - set(config["options.extras_require"])
        assert not missing, f"pip install [{extras}]: setup.cfg has no {missing}"
