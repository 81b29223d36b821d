"""Every form in which people declare classes becomes a `ClassTable` here, for every reader."""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from .classes import IGNORE, ClassTable, check_kinds, class_set_names
from .errors import naming
from .text_files import read_text, read_yaml

FILES = (".json", ".yaml", ".yml", ".txt")


def class_table(
    given,
    instances: bool = False,
    own: Mapping[int, str] | None = None,
    own_things: Collection[int] = (),
    source: str | Path = "the data",
    first_id: int = 0,
) -> ClassTable:
    """The classes that an argument or a setting declares.

    Args:
        given: a `ClassTable`; the name of a class set; the path of a json, a yaml (both in the forms of
            `ClassTable.from_data`, or with the `names` of YOLO's data.yaml) or a txt (a name per line); names, as a
            list or one text with commas; one name; or a map of ids to names.
        instances: the data are instances: classes are things unless the declaration says otherwise.
        own: id -> name that the data themselves state, as the categories of a COCO json do. Names without ids get the
            ids that they have there; a declaration with ids must not contradict it.
        own_things: ids of which the data say that they are things; asked where the declaration does not say.
        source: of `own`, for errors.
        first_id: of names without ids, where the data state none.

    Raises:
        ValueError: for what is no such form, and for an id with one name in `given` and another in `own`.
        FileNotFoundError: for a file that is not there.
    """
    with naming_classes(given):
        data = _read(given) if isinstance(given, str | Path) else given
        return _table(data, instances, own or {}, own_things, source, first_id)


def naming_classes(given) -> AbstractContextManager:
    """`errors.naming` of a declaration that is a file."""
    is_file = isinstance(given, str | Path) and Path(given).suffix.lower() in (*FILES, ".csv")
    return naming(given) if is_file else nullcontext()


def _table(data, instances: bool, own: Mapping[int, str], own_things, source, first_id: int) -> ClassTable:
    if isinstance(data, Mapping) and isinstance(data.get("names"), list | dict):  # data.yaml of YOLO
        data = data["names"]
    if names := _names_alone(data):
        numbers = _numbered(names, own, first_id)
        void = data.get("ignored", data.get("void_id")) if isinstance(data, Mapping) else None
        void = void if isinstance(void, list) else [] if void is None else [void]
        check_kinds(void, ())
        table = ClassTable.from_labels(numbers | dict.fromkeys(void, IGNORE))
    else:
        table = data if isinstance(data, ClassTable) else ClassTable.from_data(data)
        table.check_names(own, source)
    if instances:
        return table.of_instances()
    rows = [
        row._replace(isthing=row.isthing or row.index in table.unsaid and row.id in own_things) for row in table.rows
    ]
    return replace(table, rows=tuple(rows))


def _read(given: str | Path):
    """What a file, the name of a class set, or a text of names says."""
    text = str(given)
    if Path(text).suffix.lower() in FILES:
        return _read_file(Path(text))
    known = class_set_names()
    if text in known:
        return ClassTable.load(text)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) == 1:
        close = difflib.get_close_matches(text, known, cutoff=0.8) or [name for name in known if name.startswith(text)]
        if close or os.sep in text:
            raise ValueError(
                f"classes={text}: no such class set and no file ({', '.join(FILES)}); there are {', '.join(known)}"
            )
    if not names:
        raise ValueError(f"classes={text!r}: no name; give names separated by commas, a file, or a class set")
    return names


def _read_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of classes")
    if path.suffix.lower() == ".json":
        return ClassTable.json_content(path)
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return read_yaml(path)


def _names_alone(data) -> list[str] | None:
    """The names of a declaration without ids: a list, or one under `classes`; None for other forms."""
    names = data.get("classes") if isinstance(data, Mapping) else data
    alone = isinstance(names, Sequence) and not isinstance(names, str) and names
    return list(names) if alone and all(isinstance(name, str) for name in names) else None


def _numbered(names: Sequence[str], own: Mapping[int, str], first_id: int) -> dict[int, str]:
    """Id -> name in the order of the names, with the ids of `own`; a name that it lacks gets a free id."""
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"the names {double} are declared more than once: give every class its own name")
    found, free = {}, max(own, default=first_id - 1) + 1
    for name in names:
        ids = [number for number, known in own.items() if known == name]
        if not ids:
            ids, free = [free], free + 1
        found |= dict.fromkeys(ids, name)
    return found
