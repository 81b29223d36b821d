"""Text files of someone else's, and what is in json and yaml; a byte order mark at the start is no content."""

import json
from collections.abc import Callable
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: names the file that has other bytes.
        OSError: for a file that cannot be opened.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}); save it anew in this encoding") from None


def read_json(path: Path, pairs: Callable[[list], dict] | None = None):
    """What a json file holds.

    Args:
        pairs: makes a dict of each object's pairs, as `json.loads(object_pairs_hook=...)`.

    Raises:
        ValueError: names the file that holds something else, or lists that are nested too deeply.
        OSError: for a file that cannot be opened.
    """
    return _parsed(path, "json", lambda text: json.loads(text, object_pairs_hook=pairs), ())


def read_yaml(path: Path):
    """What a yaml file holds; raises as `read_json`."""
    import yaml

    return _parsed(path, "yaml", yaml.safe_load, (yaml.YAMLError,))


def _parsed(path: Path, kind: str, parse: Callable, errors: tuple):
    text = read_text(path)
    try:
        return parse(text)
    except (ValueError, *errors) as error:
        reason = " ".join(str(error).split())  # yaml's have several lines
    except RecursionError:
        reason = "its lists are nested too deeply"
    raise ValueError(f"{path}: not a {kind} file ({reason}); correct it")
