"""`mask2former-hf app`: a page in the browser that segments images and videos, here or as a Space of the Hub."""

import argparse
import re
import shutil
from pathlib import Path

from ..inference.loading import LoadingError
from ..inference.page import PACKAGES, load_gradio, load_segmenter, make_page
from .device import add_device_argument
from .main import UserError, in_flags

PORT = 7860  # Gradio's own
LARGEST_UPLOAD = "100mb"
REQUIREMENTS = (  # setup.cfg's, and its extra `app`; the Space has the package itself
    "torch>=2.6",
    "transformers>=5.17,<6",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pillow",
    "scipy",
    "tqdm",
    *PACKAGES,
)
SPACE_APP = '''"""Segments images and videos with {model}."""

from mask2former_hf.inference.page import load_segmenter, make_page

page = make_page(load_segmenter("{model}"))

if __name__ == "__main__":
    page.launch(max_file_size="{largest}")
'''
SPACE_README = """---
title: Mask2Former
emoji: 🧩
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
models:
- {model}
---

Segments images and videos with [{model}](https://huggingface.co/{model}), by the package mask2former_hf (Apache-2.0),
which is in `mask2former_hf/`.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=PORT, help="(default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument(
        "--export-space", type=Path, metavar="DIR", help="write the page as a Space of the Hub, and do not serve it"
    )


def run(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: must be 1 to 65535")
    try:
        gradio = load_gradio()
    except ImportError as error:
        raise UserError(str(error)) from error
    if arguments.export_space is not None:
        write_space(arguments.export_space, arguments.model, gradio.__version__)
        print(
            f"{arguments.export_space}: upload it by: hf upload USER/NAME {arguments.export_space} --repo-type space"
        )
        return 0
    try:
        segmenter = load_segmenter(arguments.model, arguments.device)
    except LoadingError as error:
        raise UserError(f"--model {error}") from error
    except ValueError as error:
        raise UserError(in_flags(str(error), ["device"])) from error
    try:
        page = make_page(segmenter)
    except ValueError as error:
        raise UserError(f"--model {arguments.model}: {error}") from error
    try:
        _, address, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            max_file_size=LARGEST_UPLOAD,
            prevent_thread_lock=True,
            quiet=True,  # it would advise to share the page with everybody
        )
    except OSError as error:  # Gradio's, without a number, of a port that is taken
        raise UserError(
            f"--host {arguments.host} --port {arguments.port}: cannot be served on; name another port"
        ) from error
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def write_space(folder: Path, model: str, gradio: str):
    """Write the files of a Space, which runs as it is: app.py, requirements.txt, README.md and this package.

    Args:
        folder: that is empty or does not exist.
        model: Hub id.
        gradio: version that the Space runs.

    Raises:
        UserError: for a folder with files, and a model that the Space would not find.
    """
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(
            f"--model {model}: a Space loads its checkpoint from the Hub; publish it (docs/guides/publish.md) and "
            "give its id, USER/NAME"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--export-space {folder}: is there already and is kept; name another folder")
    package = Path(__file__).parents[1]
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyc"))
    fields = {"model": model, "gradio": gradio, "largest": LARGEST_UPLOAD}
    (folder / "app.py").write_text(SPACE_APP.format(**fields), encoding="utf-8")
    (folder / "README.md").write_text(SPACE_README.format(**fields), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
