"""`fidelity`: measure a published data set again, with the teacher at hand, as a stranger would.

Positions are drawn uniformly from all shards by seed; from the token at each of them a stretch of text is evaluated
at the reference setting, in the context that the data set's own windows gave it, and compared with the rows that the
shards hold for exactly these positions. Price: the reference asks for two to three histories per token, so on a CPU
a 135M-parameter teacher takes about a second per 128-token stretch through transformers.
"""

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytecache.pipeline.context import Context
from bytecache.pipeline.stores import disk_errors
from bytecache.pipeline.units.receipts import software_versions
from bytecache.schemas.dataset.index import DATASET, Dataset, read_dataset
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.files import file_sha256, refuse_output, write_text
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import Teacher

SLACK = 0.5
"""A measured mean KL may exceed the certificate's by this share and three standard errors of the measurement."""


class Sample(NamedTuple):
    """What to measure: `number` stretches of `tokens` tokens, drawn by `seed`."""

    number: int
    tokens: int
    seed: int


def find_dataset(folder: Path) -> Dataset:
    """The data set of a run folder or of a folder with dataset.json. Raises InputError where there is none here."""
    if folder.parts and folder.parts[0].endswith(":"):  # a URL, which a path writes with one slash
        raise InputError(
            f"{str(folder).replace(':/', '://', 1)} is not on this machine; fidelity measures a local folder: "
            "fetch the data set and name its folder"
        )
    for place in (folder, folder / "targets"):
        if (place / DATASET).is_file():
            return read_dataset(place)
    raise InputError(f"{folder}: neither a data set ({DATASET}) nor a run folder with one in targets/; name either")


def teacher_settings(dataset: Dataset, settings: Teacher, model: str | None) -> Teacher:
    """`settings` with the data set's precision, windows and floor, at the reference setting.

    Raises InputError where no teacher is named and the data set's is no builtin, IntegrityError for provenance that
    cannot be used.
    """
    from bytecache.stages.lattice.effort import REFERENCE

    identity = TeacherIdentity.of(dataset.info.get("teacher", {}), dataset.folder / DATASET)
    named = model or identity.model
    if model is None and not named.startswith("builtin:"):
        raise InputError(f"the data set was made by {named or 'an unnamed teacher'}: say where it is with --teacher")
    old, (context, overlap) = identity.settings, identity.windows
    try:
        # `auto` means another precision on another device: the one that the dump was made in is wanted.
        dtype = identity.dtype or old.get("dtype", "float32")
        wanted = {"dtype": dtype, "floor": old.get("floor", settings.floor)}
        if settings.start == "auto":  # as the data set's teacher did, whatever would be measured here
            wanted["start"] = identity.start
        return Teacher(
            **settings.model_dump(include={"revision", "backend", "adapter", "start", "end", "trust_remote_code"})
            | settings.model_dump(include={"max_batched_tokens", "kv_cache_gib", "gpu_memory_utilization"})
            | {"tensor_parallel": settings.tensor_parallel, "model": named, "context": context, "overlap": overlap}
            | {"top_k": 0, "static": 0.0, **wanted, **REFERENCE}
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{dataset.folder / DATASET}: the teacher's provenance cannot be used "
            f"({' '.join(str(error).split())[:200]}); fetch or make the index again"
        ) from error


def refuse_other_teacher(dataset: Dataset, teacher: TeacherIdentity) -> None:
    """Raises InputError unless vocabulary and weights are those that made the data set."""
    maker = TeacherIdentity.of(dataset.info.get("teacher", {}), dataset.folder / DATASET)
    if maker.vocabulary != teacher.vocabulary:
        raise InputError(
            f"this teacher's vocabulary is {teacher.vocabulary[:12]}, the data set's "
            f"{maker.vocabulary[:12] or 'not stated'}: use the teacher that made it, with its start and end tokens, "
            "or --any-teacher"
        )
    there, here = maker.weights, teacher.weights
    # Of a cache of another tool, or of a model behind HTTP, nobody saw the weights.
    known = {*there, *here} if any(name.endswith(".safetensors") for name in there) else {*there}
    named = sorted(name for name in known if name.endswith(".safetensors") or name == "config.json")
    for name in named:
        if there.get(name) != here.get(name):
            raise InputError(
                f"{name} of this teacher is {str(here.get(name))[:12]}, the data set's {str(there.get(name))[:12]}: "
                "use the weights that made it, or --any-teacher to measure another one"
            )


def draw(dataset: Dataset, sample: Sample) -> list[tuple[int, int]]:
    """(shard, position in the shard) of distinct positions, uniform over the data set, in order."""
    sizes = np.array([entry.n_positions for entry in dataset.entries], np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise InputError(f"{dataset.folder}: the data set has no positions")
    picked = np.sort(np.random.default_rng(sample.seed).choice(total, min(sample.number, total), replace=False))
    shard = np.searchsorted(ends, picked, side="right")
    return [(int(s), int(p - (ends[s] - sizes[s]))) for s, p in zip(shard, picked, strict=True)]


def measure(context: Context, dataset: Dataset, settings: Teacher, sample: Sample, any_teacher: bool) -> dict[str, Any]:
    """Run the teacher on the sampled stretches; returns a certificate in the manifest's form.

    Raises InputError for another teacher than the data set's (unless `any_teacher`), IntegrityError for a shard that
    is not the one listed, Interrupted on SIGTERM.
    """
    from bytecache.schemas.shard.reader import read_shard
    from bytecache.stages.fidelity.certificate import Fidelity
    from bytecache.stages.lattice.effort import REFERENCE
    from bytecache.stages.teacher.identity import teacher_identity
    from bytecache.stages.teacher.stretches import measure_stored
    from bytecache.stages.teacher.teacher import open_teacher

    identity = teacher_identity(settings)
    if not any_teacher:
        refuse_other_teacher(dataset, TeacherIdentity.of(identity, settings.model))
    places = draw(dataset, sample)
    measured = Fidelity()
    teacher = open_teacher(settings)
    try:
        for number, group in groupby(places, key=lambda place: place[0]):
            entry = dataset.entries[number]
            path = dataset.path(entry)
            if not path.is_file() or file_sha256(path) != entry.sha256:
                raise IntegrityError(f"{path}: missing, or not the shard that the manifest lists; fetch it again")
            positions = [position for _, position in group]
            measure_stored(teacher, read_shard(path), positions, sample.tokens, measured, context.stop)
    finally:
        teacher.close()
    reference = {**REFERENCE, "backend": settings.backend, "selection": "positions drawn uniformly", **sample._asdict()}
    certificate = measured.certificate(identity, reference)
    assert certificate is not None  # at least one position was drawn
    return certificate


def claimed_by(dataset: Dataset) -> dict[str, Any] | None:
    """The data set's certificate, None where nothing was compared: a bound and the teacher's noise claim no mean KL.

    Raises IntegrityError for one whose mean KL is no number.
    """
    from bytecache.stages.fidelity.certificate import figure

    claimed = dataset.fidelity
    if claimed is None or "kl" not in claimed:
        return None
    if not math.isfinite(figure(claimed, "kl")):
        raise IntegrityError(
            f"{dataset.folder / DATASET}: its certificate has no mean KL; fetch or make the index again"
        )
    return claimed


def limit_of(claimed: dict[str, Any], measured: dict[str, Any]) -> float:
    """Largest mean KL, nats, that a measurement of this size may show of a data set that is as good as it claims."""
    from bytecache.stages.fidelity.certificate import figure

    return figure(claimed, "kl") * (1 + SLACK) + 3 * figure(measured, "kl", "stderr")


def fidelity(
    context: Context, folder: Path, model: str | None, sample: Sample, out: Path, *, any_teacher: bool = False
) -> dict[str, Any]:
    """Measure the data set in `folder`, print a table, write the report to `out`.

    Raises IntegrityError when the measured mean KL exceeds `limit_of` the data set's certificate; the report is
    written first.
    """
    from bytecache.stages.fidelity.certificate import figure

    refuse_output(out, "--out")
    dataset = find_dataset(folder)
    claimed = claimed_by(dataset)
    if dataset.info.get("mix") and not any_teacher:
        raise InputError(
            f"{dataset.folder} is a mixture of several teachers' targets, and no one teacher is behind it; measure the "
            "data sets that it was made of, or say --any-teacher to see how far it is from one"
        )
    settings = teacher_settings(dataset, context.settings.teacher, model)
    measured = measure(context, dataset, settings, sample, any_teacher)
    limit = None if claimed is None else limit_of(claimed, measured)
    report = {
        "content_sha256": dataset.content_sha256,
        "measured": measured,
        "claimed": dataset.fidelity,
        "kl_limit": limit,
        "software": software_versions(),
    }
    with disk_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(report, indent=1, sort_keys=True) + "\n")
    for line in table(measured, claimed):
        context.say(line)
    context.say(f"{out}: {measured['sample']['positions']} positions in {measured['sample']['windows']} stretches")
    if claimed and claimed.get("noise"):
        context.say("the certificate's line of the teacher's own noise is not measured again")
    if claimed is None:
        context.say("the data set has no certificate to compare with: nothing was measured when it was made")
    elif limit is not None and figure(measured, "kl") > limit:
        raise IntegrityError(
            f"{dataset.folder}: mean KL is {measured['kl']['mean']:.4g} nats/byte, its certificate says "
            f"{figure(claimed, 'kl'):.4g} and this measurement allows {limit:.4g}; do not trust these targets"
        )
    return report


def table(measured: dict[str, Any], claimed: dict[str, Any] | None) -> list[str]:
    """The two certificates side by side."""
    from bytecache.stages.fidelity.certificate import figure

    lines = [f"{'':10} {'measured':>11} {'+-':>9} {'p99':>9} {'max':>9} {'certificate':>12}"]
    for name in ("kl", "kl_bucket", "jsd", "leak", "tail"):
        row = measured[name]
        shown = "-" if claimed is None else f"{figure(claimed, name):.3g}"
        lines.append(
            f"{name:10} {row['mean']:>11.4g} {row['stderr']:>9.2g} {row['p99']:>9.2g} {row['max']:>9.2g} {shown:>12}"
        )
    return lines
