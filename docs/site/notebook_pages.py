"""Notebooks as pages of the site, with the outputs that are stored in them."""

import json

from myst_parser.parsers.sphinx_ import MystParser


class NotebookParser(MystParser):
    """Reads a notebook as the Markdown page that its cells and stored outputs make."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        super().parse(as_markdown(json.loads(inputstring)), document)


def setup(app):
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True}


def as_markdown(notebook: dict) -> str:
    """Cells one after another, each with its outputs below it."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts.extend(_output_as_markdown(output) for output in cell.get("outputs", []))
    return "\n\n".join(parts)


def _output_as_markdown(output: dict) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    if "image/png" in output["data"]:
        return f'<img alt="output" src="data:image/png;base64,{output["data"]["image/png"]}">'
    return f"```text\n{''.join(output['data']['text/plain'])}\n```"
