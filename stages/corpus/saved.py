"""Folders that `datasets.save_to_disk` wrote: exactly the files that the data set consists of, in its order."""

import json
from pathlib import Path
from typing import Any

from bytecache.schemas.errors import InputError

STATE, SPLITS = "state.json", "dataset_dict.json"
MOST_BYTES = 1 << 20


def saved_files(root: Path) -> list[tuple[Path, str]] | None:
    """(file, its name below `root`) of a saved data set; None where the folder is not one.

    Raises:
        InputError: several splits, so that a test split would be trained on; rows picked by an index beside the files;
            files that are missing.
    """
    if (root / SPLITS).is_file():
        splits = _read(root / SPLITS).get("splits")
        names = [str(name) for name in splits] if isinstance(splits, list) else []
        if len(names) != 1:
            raise InputError(
                f"corpus.source = {str(root)!r} was saved with the splits {', '.join(names[:8]) or 'none'}; name the "
                f"folder of one, such as {str(root / (names[0] if names else 'train'))!r}"
            )
        inner = saved_files(root / names[0]) or []
        return [(path, f"{names[0]}/{name}") for path, name in inner]
    if not (root / STATE).is_file():
        return None
    state = _read(root / STATE)
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        return None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(
            f"corpus.source = {str(root)!r} was saved with an index of its rows; save it again after flatten_indices()"
        )
    pieces = []
    for file in files:
        name = str(file["filename"])
        if Path(name).name != name or not (root / name).is_file():
            raise InputError(
                f"corpus.source = {str(root)!r}: {STATE} names {name!r}, which is not there; save it again"
            )
        pieces.append((root / name, name))
    return pieces


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            value = json.loads(stream.read(MOST_BYTES))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:100]}); save the data set again"
        ) from error
    return value if isinstance(value, dict) else {}
