"""What people and programs put into a field by mistake, for tables of field × value."""

import copy
import json

import pytest

DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = {
    "text": "x",
    "list": [],
    "dict": {},
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "10**20": 10**20,
    "true": True,
    "deep": DEEP,
}
every_wrong_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


def places(data, path=()):
    """Paths to every field and list of a json or a row."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data, path, value):
    data = copy.deepcopy(data)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return data


def assert_names(error, *names, most=700):
    """An error of ours: one of the names is in its text, and no huge value."""
    assert any(name in str(error) for name in names), f"{type(error).__name__}: {error}"
    assert len(str(error)) < most, f"{len(str(error))} characters: {str(error)[:300]}"
