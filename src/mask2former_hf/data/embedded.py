"""Images that stand in a text, in base64."""

import base64
import io
from collections.abc import Callable

from PIL import Image


def read_embedded(text: str, where: str, convert: Callable, size: tuple[int, int] | None = None):
    """What `convert(image, where)` makes of an image.

    Args:
        size: (H, W) that it must have; nothing is decoded before: a few kB may be a thousand megapixels.

    Raises:
        ValueError: for what is no image, or one of another size.
    """
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data)) as image:
            found = image.size[::-1]
            if size in (None, found):
                image.load()
                return convert(image, where)
    except Exception as error:  # Pillow has no common class for what damaged files raise: SyntaxError, ...
        raise ValueError(f"{where} is no image in base64 ({error}); remove it") from None
    raise ValueError(f"{where} has {found[0]} x {found[1]} pixels and its place {size[0]} x {size[1]}; remove it")
