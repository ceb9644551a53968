"""What all workers of a job agree on, checked before the first claim.

The first worker writes it (`put_if_absent`), every other one compares: the plan's hash, the stage's identity (weights,
settings), the versions of the libraries and a hash of every source file that computes an output. A difference is
refused by name, so two versions of the software cannot mix their units under one plan.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from bytecache.pipeline.config import changed_keys, flattened
from bytecache.pipeline.fleet.ledger import Layout, read_json
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.runner import Job
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.files import file_sha256

VERSION = 1
_SHOWN = 4
_OF_STUDENTS = tuple(f"stages/{room}" for room in ("targets/", "student/", "train/", "evaluate/", "export.py"))


@cache
def code_hashes() -> dict[str, str]:
    """Hash of each source file of `schemas` and `stages` by its path; what works on students alone is left out."""
    hashes = {}
    for package in ("schemas", "stages"):
        spec = importlib.util.find_spec(f"bytecache.{package}")
        if spec is None or spec.origin is None:
            raise IntegrityError(f"source of {package} not found; reinstall bytecache")
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            name = f"{package}/{file.relative_to(root).as_posix()}"
            if not name.startswith(_OF_STUDENTS):
                hashes[name] = file_sha256(file)[:12]
    return hashes


def record(job: Job) -> dict[str, Any]:
    """The job as written to the store."""
    versions = receipts.software_versions()
    versions.pop("python", None)  # its patch level decides no output
    return {
        "version": VERSION,
        "stage": job.stage,
        "units": len(job.measures),
        "bytes": sum(job.measures),
        "identity": job.identity,
        "software": versions,
        "code": code_hashes(),
    }


def join(store: Store, job: Job) -> None:
    """Begin the job, or check that it was begun with the same settings and software. Raises ConfigError if not."""
    layout, ours = Layout(job.stage, job.edition), record(job)
    if store.put_json_if_absent(layout.job, ours):
        return
    theirs = read_json(store, layout.job)
    if theirs is None:
        raise IntegrityError(f"{store.name}/{layout.job} is damaged; delete it when no worker runs, then start again")
    changes = list(changed_keys(flattened(theirs), flattened(ours)))
    if changes:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise ConfigError(
            f"{store.name}: the {job.stage} job of this plan was begun with other settings or software "
            f"({'; '.join(changes[:_SHOWN])}{more}); use the same everywhere, choose a new run.dir, or, once no worker "
            f"runs, give that job up with `bytecache retry {job.stage} --new-job`"
        )
