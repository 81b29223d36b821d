"""Every form in which people declare classes becomes a `ClassTable` here."""

from collections.abc import Mapping
from pathlib import Path

from .classes import IGNORE, ClassTable


def class_table(given, instances: bool = False) -> ClassTable:
    """The classes that a setting or an argument declares.

    Args:
        given: a `ClassTable`; the name of a class set; the path of a json; names, as a list or separated by commas; or
            a map of numbers to names.
        instances: the data are instances, so that declared classes are things.
    """
    if isinstance(given, ClassTable):
        return given
    if isinstance(given, str | Path):
        if Path(given).suffix == ".json":
            return ClassTable.from_json(given)
        if "," not in str(given):
            return ClassTable.load(str(given))
        given = [name.strip() for name in str(given).split(",")]
    labels = given if isinstance(given, Mapping) else dict(enumerate(given))
    try:
        labels = {int(number): name if name is IGNORE else str(name) for number, name in labels.items()}
    except ValueError as error:
        raise ValueError(f"classes: a mapping must be from numbers in the maps to names ({error})") from error
    things = [name for name in labels.values() if name is not IGNORE] if instances else ()
    return ClassTable.from_labels(labels, things)
