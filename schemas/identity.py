"""Who made a dump or a data set: the teacher's identity, one document with one meaning of every field.

It is JSON in the metadata of a dump part, in the key of every unit and in `info.teacher` of dataset.json, and is never
changed on the way: `of` reads it, `as_json` gives it back to the letter. A field that a document lacks has the value
here; one that this software does not know is kept.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.whole import Whole


class TeacherIdentity(BaseModel):
    """What makes two dumps comparable. Frozen and hashable; equal if every field is."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    format: tuple[str, Whole] = ("", 0)
    """Format and version of the dump."""
    kind: str = "teacher"
    """`foreign`: no teacher of ours, but a cache of token probabilities."""
    model: str = ""
    """For strangers: a hub id, a builtin name, or the last part of a folder's path."""
    revision: str = ""
    weights: dict[str, str] = {}
    """sha256 of weights, configuration and tokenizer files, by name."""
    vocabulary: str = ""
    """Fingerprint of the vocabulary with its start and end tokens."""
    start: str = "auto"
    """Name of the token that begins every document."""
    settings: dict[str, Any] = {}
    """What of `[teacher]` decides the numbers, presets resolved."""
    dtype: str = ""
    """Precision of the trunk."""
    device: str = ""
    """`cpu`, or the GPU's name."""
    effort: Whole = 1
    """Version of the rule by which histories are evaluated at equal settings."""
    static_contexts: tuple[str, ...] = ()
    """Contexts in which static rows were evaluated."""
    windows: tuple[Whole, Whole] = (0, -1)
    """Tokens of a window, and of its overlap with the one before."""
    head_dtype: str = ""
    versions: dict[str, str] = {}
    """Of the libraries that computed."""

    @classmethod
    def of(cls, document: Any, where: Any) -> "TeacherIdentity":
        """A document as somebody wrote it, in the file `where`. Raises IntegrityError, naming the field."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "it"
            raise IntegrityError(
                f"{where}: the teacher's identity cannot be used ({field}: {first['msg']}); fetch the file again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """The document: the fields that it has, no other."""
        return self.model_dump(mode="json", exclude_unset=True)

    def chosen(self) -> dict[str, Any]:
        """Keys of `[teacher]` that the document states, with their values."""
        stated = self.model_fields_set & {"model", "revision"}
        return {**self.settings, **{name: getattr(self, name) for name in stated}}

    @property
    def sha256(self) -> str:
        """Of the document with sorted keys."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.sha256)
