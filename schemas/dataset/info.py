"""`info` of a data set: what is said of its teacher, text, settings and making, and of which kind each part is.

Ours is made whole before it is written; a stranger's is refused where a reader would meet another kind than it expects.
"""

import json
import re
from typing import Any

from bytecache.schemas.errors import InputError
from bytecache.schemas.whole import is_whole

_OBJECTS = ("teacher", "tokenizer", "corpus", "settings", "software", "creation")
_SHAPES: dict[tuple[str, str], type] = {
    ("teacher", "model"): str, ("teacher", "name"): str, ("teacher", "revision"): str, ("teacher", "vocabulary"): str,
    ("teacher", "settings"): dict, ("teacher", "weights"): dict, ("teacher", "windows"): list,
    ("teacher", "versions"): dict, ("settings", "plan"): dict, ("settings", "convert"): dict,
    ("creation", "set_aside"): dict, ("creation", "missing"): list,
}  # fmt: skip
"""What inside those objects somebody here reads, and its kind where it is there."""
_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
}  # fmt: skip
MAX_DEPTH = 32
"""Objects and lists of `info` in each other."""
_FREE_TEXT = ("name", "license", "corpus_license", "teacher_license", "attribution")


def completed(info: dict[str, Any]) -> dict[str, Any]:
    """The same with what is absent as empty: objects, then text."""
    return {name: {} for name in _OBJECTS} | dict.fromkeys(_FREE_TEXT, "") | info


def checked_info(info: dict[str, Any]) -> dict[str, Any]:
    """What is to be written, as plain JSON and completed. Raises InputError for what is none, or of another kind."""
    try:
        plain = json.loads(json.dumps(info, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise InputError(f"dataset info is not plain JSON: {error}; use text, numbers, lists and objects") from error
    out = completed(plain)
    for names, kind in ((_OBJECTS, dict), (_FREE_TEXT, str)):
        for name in names:
            if not isinstance(out[name], kind):
                raise InputError(f"dataset info {name!r} is a {type(out[name]).__name__}, must be a {kind.__name__}")
    return out


def misshapen(info: dict[str, Any]) -> str:
    """What in a stranger's `info`, completed, is not of the kind that its readers expect, in words; "" where all is."""
    for names, kind in ((_OBJECTS, dict), (_FREE_TEXT, str)):
        for name in names:
            if not isinstance(info[name], kind):
                return f"{name} is {_kind(info[name])}, must be {_KINDS[kind]}"
    for (outer, inner), wanted in _SHAPES.items():
        value = info[outer].get(inner)
        if value is not None and type(value) is not wanted:
            return f"{outer}.{inner} is {_kind(value)}, must be {_KINDS[wanted]}"
    edition = info.get("edition", {"number": 1, "parent": ""})
    if not isinstance(edition, dict) or not is_whole(edition.get("number"), 1) or edition["number"] >= 10**5:
        return "edition.number is no number from 1 to 99999"
    parent = edition.get("parent")
    if not isinstance(parent, str) or not re.fullmatch(
        "[0-9a-f]{64}" if edition["number"] > 1 and parent else "", parent
    ):
        return "edition.parent is no content hash of an edition before, or edition 1 has one"
    for unit in info["creation"].get("missing") or []:
        fits = isinstance(unit, dict) and all(
            is_whole(unit.get(name), 0) for name in ("unit", "n_documents", "n_bytes")
        )
        if not fits or not isinstance(unit.get("reason"), str):
            return "creation.missing holds what is no unit: unit, n_documents, n_bytes and reason"
    return f"is nested deeper than {MAX_DEPTH}" if depth(info) > MAX_DEPTH else ""


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def depth(value: Any) -> int:
    """How many objects and lists lie in each other; without recursion, for whoever walks them later recurses."""
    levels, level = 0, [value]
    while level:
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [each for one in inner for each in (one.values() if isinstance(one, dict) else one)]
        levels += bool(inner)
    return levels
