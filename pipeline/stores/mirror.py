"""Local copies of remote objects: each with a note of the version it came from, so that a stale one is never used.

A copy lives at `files/<key>`, its note (version tag, size, modification time) at `notes/<key>.json`; both appear by
rename, so processes of one machine share a mirror. A copy that was altered here no longer fits its note.
"""

import contextlib
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from bytecache.schemas.files import make_folder, put_in_place
from bytecache.schemas.whole import Count, Whole


class Note(BaseModel):
    """Where a local copy came from: the object's `version` tag; `size` and `mtime_ns` of the copy as it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str
    size: Count
    mtime_ns: Whole


class Mirror:
    """Files under `root`; paths are made on first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Where the copy of `key` lives."""
        return self.root / "files" / key

    def _note_path(self, key: str) -> Path:
        return self.root / "notes" / f"{key}.json"

    def note(self, key: str) -> Note | None:
        """The note of a copy, or None if there is none that can be read."""
        with contextlib.suppress(OSError, ValidationError):
            return Note.model_validate_json(self._note_path(key).read_bytes())
        return None

    def unaltered(self, key: str) -> Note | None:
        """The note, if the copy is there as it was made."""
        note = self.note(key)
        with contextlib.suppress(OSError):
            stat = self.path(key).stat()
            if note and (stat.st_size, stat.st_mtime_ns) == (note.size, note.mtime_ns):
                return note
        return None

    def fresh(self, key: str, version: str) -> bool:
        """Whether the copy is there, unaltered, and of this version."""
        note = self.unaltered(key)
        return note is not None and note.version == version

    def adopt(self, key: str, source: Path, version: str) -> Path:
        """Make `source` (same device) the copy of `key`."""
        path = self.path(key)
        make_folder(path.parent)
        put_in_place(source, path)
        self.describe(key, version, path.stat())
        return path

    def describe(self, key: str, version: str, stat: os.stat_result) -> None:
        """Note that the file at `path(key)`, when this was its `stat`, equalled this version of the object."""
        note = Note(version=version, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        place = self._note_path(key)
        make_folder(place.parent)
        temporary = place.with_name(f".{os.getpid()}-{place.name}")
        temporary.write_text(json.dumps(note.model_dump()))
        put_in_place(temporary, place)

    def drop(self, key: str) -> None:
        """Forget a copy and free its space."""
        with contextlib.suppress(OSError):
            self._note_path(key).unlink(missing_ok=True)
            self.path(key).unlink(missing_ok=True)

    def keys(self, prefix: str) -> list[str]:
        """Keys of the files under `prefix`, sorted; links, scratch and other hidden files excluded."""
        base = self.root / "files"
        return sorted(
            path.relative_to(base).as_posix()
            for path in (base / prefix).rglob("*")
            if path.is_file()
            and not path.is_symlink()
            and not any(part.startswith(".") for part in path.relative_to(base / prefix).parts)
        )
