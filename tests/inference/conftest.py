"""The page in a headless browser; skipped where Gradio, Playwright or the browser is missing."""

from pathlib import Path

import pytest

from mask2former_hf.inference.page import make_page

CHROMIUM = Path("/usr/bin/chromium")
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")  # shows a clock's hand


@pytest.fixture
def serve():
    """(segmenter, options of `make_page`) → the address of its page."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
    pages = []

    def start(segmenter, **options):
        pages.append(make_page(segmenter, **options))
        return pages[-1].launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is missing")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM}, the browser, is missing")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_CAMERA])
        yield chromium
        chromium.close()
