"""`verify --repair --from`: a data set on its own is made whole from where it came from.

Only bytes with the manifest's sha256 are accepted, so the source need not be trusted. What can be made here (the card)
is; what is in the way is set aside beside the data set's files. Price: what is bad is transferred, the rest hashed.
"""

import os
from pathlib import Path

from bytecache.pipeline.units.aside import ASIDE
from bytecache.schemas import strict_json
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.editions import older_editions
from bytecache.schemas.dataset.index import DATASET, MANIFEST, MAX_JSON, MAX_MANIFEST, read_dataset
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.files import make_folder, replace_file, scratch_folder
from bytecache.stages.targets.source import DIRECT, Access, fetch_bytes, fetch_file


def repair_dataset(folder: Path, source: str, access: Access = DIRECT) -> list[str]:
    """Fetch again what is bad in a data set that came from `source` (a folder or URL); returns what was done.

    Raises IntegrityError when the source does not hold the bytes that the manifest states, StorageError when it
    cannot be read.
    """
    from bytecache.schemas.dataset.verification import verify_dataset

    base = source.rstrip("/")
    done = _mend_index(folder, base, access) + _mend_older(folder, base, access)
    older = [read_dataset(place) for _, place in older_editions(folder)]
    entries = {entry.file: entry for dataset in (*older, read_dataset(folder)) for entry in dataset.entries}
    for problem in verify_dataset(folder):
        if problem.kind in ("index", "older"):
            raise IntegrityError(f"{base} has the same fault: {problem.file} {problem.detail}; ask its maker")
        if problem.kind in ("duplicated", "foreign") or problem.file == card.FILE:
            done.append(_settle(folder, problem.file, problem.kind))
            continue
        entry = entries[problem.file]
        fetch_file(f"{base}/{entry.file}", folder / entry.file, entry.size, entry.sha256, access)
        done.append(f"fetched: {entry.file} ({problem.kind}: {problem.detail})")
    return done


def _mend_index(folder: Path, base: str, access: Access) -> list[str]:
    """Fetch the index if the one here is damaged.

    Into a scratch folder first: a source that is no data set must not cost the index that is here.
    """
    from bytecache.schemas.dataset.verification import check_editions

    try:
        dataset = read_dataset(folder)
    except IntegrityError as error:
        _fetch_index(folder, base, access)
        return [f"fetched: the index ({error})"]
    faults = [problem.detail for problem in check_editions(dataset)[1] if problem.kind == "index"]
    if not faults:
        return []
    _fetch_index(folder, base, access)
    return [f"fetched: the index (it {faults[0]})"]


def _mend_older(folder: Path, base: str, access: Access) -> list[str]:
    """The same for the indices of older editions."""
    from bytecache.schemas.dataset.verification import check_editions

    done = []
    for problem in check_editions(read_dataset(folder))[1]:
        if problem.kind == "older":
            place = problem.file.rpartition("/")[0]
            _fetch_index(folder / place, f"{base}/{place}", access)
            done.append(f"fetched: the index of {place} ({problem.detail})")
    return done


def _fetch_index(folder: Path, base: str, access: Access) -> None:
    with scratch_folder(folder) as scratch:
        document = fetch_bytes(f"{base}/{DATASET}", MAX_JSON, access)
        table = fetch_bytes(f"{base}/{MANIFEST}", MAX_MANIFEST, access)
        (scratch / DATASET).write_bytes(document)
        (scratch / MANIFEST).write_bytes(table)
        read_dataset(scratch)
    replace_file(folder / MANIFEST, table)
    replace_file(folder / DATASET, document)


def _settle(folder: Path, file: str, kind: str) -> str:
    """A second copy goes; a shard that nothing lists and a damaged card are moved out of the data set."""
    aside = folder / ASIDE
    if kind == "duplicated":
        (folder / file).unlink()
        return f"removed: {file}, a second copy of a listed shard"
    if (folder / file).exists():
        make_folder(aside)
        os.replace(folder / file, _free(aside / file))
    if file == card.FILE:
        replace_file(folder / file, card.render(strict_json.parse((folder / DATASET).read_bytes())))
        return f"made again: {file}, which was {kind}; an old one is in {aside}"
    return f"moved: {file}, which no index lists, to {aside}"


def _free(place: Path) -> Path:
    """`place`, numbered if something is there: what was set aside before stays."""
    number, free = 0, place
    while free.exists():
        number += 1
        free = place.with_name(f"{place.name}.{number}")
    return free
