"""The teacher's identity: read from anybody's document, given back to the letter, refused by field."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.identity import TeacherIdentity

WHOLE: dict[str, Any] = {
    "format": ["bytecache.token-dump", 2],
    "model": "small",
    "revision": "",
    "weights": {"model.safetensors": "ab"},
    "vocabulary": "cd",
    "settings": {"tau": 0.1, "depth": 2, "static": 0.0},
    "dtype": "float32",
    "device": "cpu",
    "static_contexts": ["\n", " in"],
    "windows": [1024, 256],
    "head_dtype": "float32",
    "versions": {"torch": "2"},
}
words = some.text(max_size=8)
leaves = some.none() | some.booleans() | some.integers() | words
others = some.dictionaries(
    some.sampled_from(["later", "cache", "start_measured"]), leaves | some.lists(leaves, max_size=2)
)


@settings(deadline=None)
@given(some.sets(some.sampled_from(sorted(WHOLE))), others)
def test_a_document_is_given_back_to_the_letter(fields: set[str], more: dict[str, Any]) -> None:
    """It is in the key of every unit: a field that is added or lost would make all of them other units."""
    document = {name: WHOLE[name] for name in fields} | more
    identity = TeacherIdentity.of(document, "here")
    assert json.dumps(identity.as_json(), sort_keys=True) == json.dumps(document, sort_keys=True)
    assert identity == TeacherIdentity.of(json.loads(json.dumps(document)), "there")
    assert hash(identity) == hash(TeacherIdentity.of(document, "there"))
    for name in fields:
        changed = {**document, name: TeacherIdentity().model_dump(mode="json")[name]}
        assert (TeacherIdentity.of(changed, "x").sha256 == identity.sha256) == (changed == document)


def test_what_was_chosen_is_what_is_stated() -> None:
    assert TeacherIdentity.of({"settings": {"tau": 0.1}, "model": "a"}, "x").chosen() == {"tau": 0.1, "model": "a"}
    assert TeacherIdentity.of({}, "x").chosen() == {}


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TeacherIdentity.of(WHOLE, "x").model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"weights": [1]}, "weights"),
        ({"settings": "fast"}, "settings"),
        ({"windows": [1]}, "windows"),
        ({"vocabulary": {"a": 1}}, "vocabulary"),
        ({"versions": {"torch": []}}, "versions.torch"),
        ("a teacher", "it"),
        (None, "it"),
    ],
)
def test_what_cannot_be_one_is_refused_by_field(document: Any, field: str) -> None:
    with pytest.raises(IntegrityError, match=rf"dataset\.json: the teacher's identity cannot be used \({field}"):
        TeacherIdentity.of(document, "dataset.json")
