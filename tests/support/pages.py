"""Runs the code blocks of Markdown pages as a reader would, in a folder that has what the pages name.

`python` blocks of a page share a namespace; `bash` blocks run line by line in this process, by the same functions as
the installed command. Checkpoints of the Hub are folders of that name in the working folder, with tiny random models.
"""

import configparser
import re
import shlex
from pathlib import Path

from torch.distributed.run import get_args_parser

from mask2former_hf.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What makes a run long is made short; everything else is run as it is written.
SHORT = {"--epochs": "--steps=1", "--steps": "--steps=1", "--crop": "--crop=64", "--test-size": "--test-size=64"}
SHORT_IN_PYTHON = (re.compile(r"\b(?:epochs|steps)=\d+"), "steps=1, crop=64, cpu=True")


def blocks(page: Path):
    """(language, text, line of the page) of every block that is code."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        yield found[1], found[2], text[: found.start()].count("\n") + 2


def run_page(page: Path):
    """Run all blocks of a page in the working folder.

    Raises:
        Exception: of a Python block, its line being that of the page.
        AssertionError: of a command that fails, or that nothing here can run.
    """
    namespace = {"__name__": "__main__"}
    for language, text, line in blocks(page):
        if language == "python":
            pattern, short = SHORT_IN_PYTHON
            exec(compile("\n" * (line - 1) + pattern.sub(short, text), str(page), "exec"), namespace)
        else:
            for words in commands(text):
                run_command(words, f"{page.name}:{line}")


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
    arguments = shortened(words[1:]) if words[1] == "train" else words[1:]
    assert main(arguments) == 0, f"{where}: {shlex.join(words)}"


def shortened(arguments: list[str]) -> list[str]:
    """A training command as it is, but of one small step on the CPU."""
    result, replaced = [], False
    for word in arguments:
        if word.startswith("--"):
            replaced = word in SHORT
            result.append(SHORT.get(word, word))
        elif not replaced:
            result.append(word)
    return [*result, SHORT["--crop"], "--cpu"]


def check_extras(words: list[str]):
    """Extras that a page tells to install exist."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert extra in config["options.extras_require"], f"pip install [{extra}]: setup.cfg has no such extra"
