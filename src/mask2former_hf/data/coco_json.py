"""What a COCO json says: lists whose fields are checked, and the dialects of annotation tools in one form."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from .classes import ClassTable
from .fields import FLAG, LIST, Rule, displayed, is_flat, read_entry, whole
from .text_files import read_json

logger = logging.getLogger(__name__)


def _area(value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError
    return value


def _box(value) -> list | None:
    numbers = isinstance(value, list) and {int, float}.issuperset(map(type, value)) and all(map(math.isfinite, value))
    if not numbers or len(value) not in (0, 4):
        raise ValueError
    return value or None


def _mask(value) -> list | dict | None:
    """Its form alone: the numbers are checked where the mask is drawn, with the image's size."""
    if not isinstance(value, list | dict) or not is_flat(value, 2):  # [{"counts": [...]}]
        raise ValueError
    parts = value if isinstance(value, list) else value.values()
    return value if any(part not in ([], {}) for part in parts) else None


AREA = Rule(_area, "a number of pixels, 0 or more")
IS_CROWD = FLAG._replace(text="0 or 1")
BOX = Rule(_box, "four numbers, x, y, width, height")
MASK = Rule(_mask, "polygons [[x, y, x, y, ...], ...] or run lengths {size, counts}")
SEGMENTS = LIST._replace(text="a list of segments")
PNG_ID = Rule(lambda value: whole(value, 1, 2**24), "a whole number from 1 to 2**24 - 1, as the colours of the PNG")


def load_coco(path: Path, fields: Mapping[str, Mapping[str, Rule]]) -> dict[str, list[dict]]:
    """The lists of a json that `fields` names, each entry with the fields of its rules alone, and `categories` as is.

    A list may also be a dict whose values are the entries; a null stands for a field that is not there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: names file, place, field and value, and says what it must be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a COCO json, which has the lists {', '.join(fields)}; it is a list")
    categories = data.get("categories")
    checked = {"categories": [] if categories is None else _entries(categories)}
    if not isinstance(checked["categories"], list):
        found = displayed(categories)
        raise ValueError(f"{path} has categories={found}; it must be a list of {{id, name}}: correct it, or remove it")
    for name, rules in fields.items():
        entries = _entries(data.get(name))
        if not isinstance(entries, list):
            found = f"{name} is {displayed(data[name])}" if name in data else f"there is no {name}"
            raise ValueError(f"{path}: not a COCO json, which has the lists {', '.join(fields)}; {found}")
        checked[name] = [read_entry(entry, rules, f"{path}: {name}[{k}]") for k, entry in enumerate(entries)]
    return checked


def _entries(value):
    """A list of entries; of a dict, as some tools write it by id, its values."""
    is_dict = isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())
    return list(value.values()) if is_dict else value


def same_id(value: int | str) -> int | str:
    """What ids are compared by: "7" is 7, because tools write the same id as text in one list and not in another."""
    if not isinstance(value, str) or not value.isdecimal() or len(value) > 18 or str(int(value)) != value:
        return value
    return int(value)


def say_if_mixed(path: Path, what: str, ids: list, references: list):
    """A warning if ids are text on one side and numbers on the other."""
    if len({isinstance(value, str) for value in (*ids, *references) if isinstance(same_id(value), int)}) > 1:
        logger.warning('%s: %s are text in one place and numbers in another; "7" is read as 7', path, what)


def categories_table(categories: list, used: set, path: Path, isthing: bool | None = None) -> ClassTable:
    """The class table of a json's categories, whose ids may be text; groups of other categories are no classes.

    Args:
        used: ids that annotations have: a category of Roboflow's that only names the supercategory of the others and
            is not used is left out.
        isthing: see `ClassTable.from_categories`.
    """
    if not categories:
        raise ValueError(f"{path}: no categories; add them to the json, or give classes=")
    kept = []
    for category in categories:
        if isinstance(category, dict):
            category = {key: value for key, value in category.items() if value is not None}
            if isinstance(category.get("id"), str | float):
                category["id"] = _number(category["id"])
        kept.append(category)
    dicts = [category for category in kept if isinstance(category, dict)]
    groups = [category for category in dicts if _is_group(category, dicts, used)]
    if groups and len(groups) < len(kept):
        names = ", ".join(group["name"] for group in groups)
        logger.warning("%s: %s only groups other categories and has no annotation: it is no class", path, names)
        kept = [category for category in kept if not any(category is group for group in groups)]
    try:
        return ClassTable.from_categories(kept, isthing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _number(value):
    try:
        return whole(same_id(value))
    except ValueError:
        return value


def _is_group(category: dict, categories: list[dict], used: set) -> bool:
    name, number = category.get("name"), category.get("id")
    is_top = isinstance(name, str) and category.get("supercategory") in (None, "", "none")
    unused = isinstance(number, int) and number not in used
    return is_top and unused and any(other.get("supercategory") == name for other in categories)
