"""Docstrings are Markdown with Google's sections, and Sphinx's autodoc reads reStructuredText: the step between."""

import dataclasses
import re

_FENCE = re.compile(r"^```\w*$")
_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"[*|\\]|_(?=\W|$)")  # what reStructuredText would take for emphasis, a substitution or a link


def setup(app):
    app.connect("autodoc-process-docstring", translate, priority=400)  # napoleon, which makes the sections, is at 500
    return {"parallel_read_safe": True}


def translate(app, what, name, obj, options, lines: list[str]):
    """Rewrite the lines of a docstring in place."""
    if what == "class" and dataclasses.is_dataclass(obj):
        lines.extend(_settings(obj))
    lines[:] = to_rst(lines)


def to_rst(lines: list[str]) -> list[str]:
    """Fences become literal blocks; `code` becomes ``code``; in the text between, markup characters are escaped."""
    result, fence = [], None
    for line in lines:
        if _FENCE.match(line.strip()):
            indent = line[: len(line) - len(line.lstrip())]
            result.extend([f"{indent}::", ""] if fence is None else [""])
            fence = indent if fence is None else None
        elif fence is not None:
            result.append("    " + line if line else line)
        else:
            parts = _CODE.split(line)
            result.append("".join(f"`{part}`" if part[:1] == "`" else _MARKUP.sub(r"\\\g<0>", part) for part in parts))
    return result


def _settings(cls) -> list[str]:
    """The texts that a dataclass has at its fields, as a section of arguments."""
    told = [(entry.name, entry.metadata["help"]) for entry in dataclasses.fields(cls) if "help" in entry.metadata]
    return ["", "Args:", *(f"    {name}: {text}." for name, text in told)] if told else []
