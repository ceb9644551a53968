"""`import`: a cache that another tool wrote becomes a run's corpus and its token dump, ready for `convert`.

The documents' text is written into the run folder and planned like any corpus; then each unit's dump is made from the
cache instead of a teacher, with receipts as ever, so an import that broke off goes on where it was. What a cache does
not list is the targets' tail; it has no branches, no static rows and no certificate (`fidelity --teacher` makes one).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bytecache.pipeline.commands.teacher import opened_slice, unit_inputs, unit_name
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import Plan
from bytecache.pipeline.plan.make import make_plan
from bytecache.pipeline.stores.local import LocalStore
from bytecache.pipeline.units.receipts import unit_key
from bytecache.pipeline.units.runner import Job, Outcome, Task, Tick, Work, outcome_line, run_job
from bytecache.schemas.dump import parquet as token_dump
from bytecache.schemas.errors import ConfigError, InputError, Interrupted
from bytecache.schemas.files import arrow_path, file_sha256, flush_to_disk, make_folder, put_in_place
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import Settings
from bytecache.stages.foreign.cache import Aside, ForeignTeacher, read_off
from bytecache.stages.foreign.packed import settings_of
from bytecache.stages.foreign.records import Cache, Columns
from bytecache.stages.models.locate import model_name, resolve_model
from bytecache.stages.tokens.vocab import load_vocabulary

CORPUS = "import/corpus.parquet"
_ROWS = 1000


class Source(NamedTuple):
    """What a user says of a cache."""

    place: Path
    layout: str
    columns: Columns | None = None
    alignment: str = ""
    """One of `stages.foreign.cache.ALIGNMENTS`; empty: read off the content."""
    renormalised: bool = False


def import_cache(context: Context, source: Source) -> Outcome:
    """Plan a cache's documents and dump what it says of them.

    `context`: its corpus.source is `CORPUS` in the run folder. Raises ConfigError (the layout, the tokenizer or
    what the content does not tell), InputError (the files), Interrupted.
    """
    store = context.store
    if not isinstance(store, LocalStore):
        raise ConfigError(f"run.dir = {store.name}: an import writes to a folder of this machine; choose one")
    teacher = _open(context, source)
    reading = teacher.reading
    context.say(
        f"import: {len(teacher.cache)} records of layout {source.layout}, {reading.k} entries a position that hold "
        f"{reading.listed_mass:.4f} of the mass; alignment {reading.alignment}, the true token is listed at "
        f"{100 * reading.hit_rate:.1f} % of positions"
    )
    if teacher.cache.passed_over:
        context.say(f"import: {teacher.cache.passed_over} files of other kinds are no part of the cache, passed over")
    aside, strays, unlisted = _write_corpus(teacher, store.root / CORPUS)
    if unlisted:
        context.say(
            f"import: {unlisted} documents have nothing listed about them: they are read, and nothing is learned"
        )
    if strays:
        context.say(
            f"import: {strays} listed ids are none of the tokenizer's {teacher.vocabulary.size}; their mass counts as "
            "unlisted (a head may be padded; else check that this is the teacher's tokenizer)"
        )
    if aside:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(aside.items()))
        context.say(f"import: documents set aside ({reasons})")
    planned, _ = make_plan(store, context.settings, context.stop)
    outcome = run_job(store, _job(context, planned, teacher, source), context.stop)
    context.save_config("teacher/config.toml", changed=outcome.made > 0, of=outcome.content)
    context.say(outcome_line("import", outcome))
    return outcome


def _open(context: Context, source: Source) -> ForeignTeacher:
    settings = context.settings.teacher
    vocabulary = load_vocabulary(resolve_model(settings), start=settings.start, end=settings.end)
    cache = Cache(source.place, source.layout, source.columns)
    if not len(cache):
        raise InputError(f"{source.place} holds no record")
    return ForeignTeacher(cache, vocabulary, read_off(cache, source.alignment, source.renormalised))


class Written(NamedTuple):
    """What became of a cache's records beside the documents of the corpus."""

    aside: Counter[str]
    """Why documents were set aside, and how many."""
    strays: int
    """Ids of no token in the lists; a text with such an id is set aside."""
    unlisted: int
    """Documents of the corpus about which nothing is listed."""


def _write_corpus(teacher: ForeignTeacher, path: Path) -> Written:
    """The documents' text as a corpus of the run."""
    aside: Counter[str] = Counter()
    strays = unlisted = 0
    schema = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(arrow_path(temporary), schema, compression="zstd") as writer:
        rows: list[dict[str, str]] = []
        for number in range(len(teacher.cache)):
            record = teacher.cache[number]
            strays += int((record.ids >= teacher.vocabulary.size).sum())
            for index, document in enumerate(teacher.documents(record)):
                if isinstance(document, Aside):
                    aside[document.reason] += 1
                    continue
                try:
                    rows.append({"id": f"{number}.{index}", "text": teacher.text(document).decode("utf-8")})
                except UnicodeDecodeError:
                    aside["text is no UTF-8"] += 1
                else:
                    unlisted += not (document.rows >= 0).any()
            if len(rows) >= _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    flush_to_disk(temporary)
    put_in_place(temporary, path)
    return Written(aside, strays, unlisted)


def identity_of(teacher: ForeignTeacher, source: Source, settings: Settings) -> dict[str, Any]:
    """What makes two imports comparable; in the place of a teacher's identity."""
    cache = {
        "layout": source.layout,
        "files": [file_sha256(file.path) for file in teacher.cache.files],
        "packing": settings_of(teacher.cache.packing),
        "alignment": teacher.reading.alignment,
        "k": teacher.reading.k,
        "true_token_always_listed": teacher.reading.always_true,
        "renormalised": source.renormalised,
    }
    identity = TeacherIdentity(
        format=(token_dump.FORMAT, token_dump.VERSION),
        kind="foreign",
        model=model_name(settings.teacher),
        revision=settings.teacher.revision,
        vocabulary=teacher.vocabulary.fingerprint,
        cache=cache,
        settings={},
    )
    return identity.as_json()


def _job(context: Context, planned: Plan, teacher: ForeignTeacher, source: Source) -> Job:
    identity = identity_of(teacher, source, context.settings)

    def task(index: int) -> Task:
        unit = planned.units[index]
        inputs = unit_inputs(unit, identity, {})
        name = unit_name(unit)
        out = f"teacher/{name}-{unit_key('teacher', inputs)[:12]}.parquet"
        return Task("teacher", name, out, inputs, unit.n_bytes, unit)

    @contextmanager
    def open_work(stop: Callable[[], bool]) -> Iterator[Work]:
        def work(task: Task, out: Path, tick: Tick) -> dict[str, Any]:
            with opened_slice(context.store, task.payload) as piece:
                return _dump_unit(teacher, piece, out, {"teacher": identity, "unit": task.key}, stop, tick)

        yield work

    return Job("teacher", {"plan": planned.hash, "teacher": identity}, planned.sizes, task, open_work)


def _dump_unit(
    teacher: ForeignTeacher, piece: Path, out: Path, meta: dict[str, Any], stop: Callable[[], bool], tick: Tick
) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "documents": 0, "bytes": 0, "tokens": 0, "branches": 0, "static": 0, "windows": 0, "canonical_nll": 0.0,
        "set_aside": {}, "set_aside_documents": [],
    }  # fmt: skip
    described = {"vocabulary": teacher.vocabulary.describe(), "kind": "text", "ends": True, "reference": {}}
    writer = token_dump.DumpWriter(out, {**meta, **described})
    for index, doc_id in enumerate(pq.read_table(arrow_path(piece), columns=["doc_id"]).column("doc_id").to_pylist()):
        if stop():
            raise Interrupted("stopped while importing; rerun the same command to continue")
        number, _, inside = doc_id.partition(".")
        record = teacher.cache[int(number)]
        document = list(teacher.documents(record))[int(inside)]
        if isinstance(document, Aside):
            raise InputError(f"{teacher.cache.place}: record {number} changed during the import; start again")
        window = teacher.window(doc_id, index, record, document)
        writer.append(window)
        scored = len(window.text) - window.score_start
        done = {"bytes": scored, "tokens": len(document.tokens), "branches": 0, "static": 0}
        for name, value in done.items():
            counts[name] += value
        counts["documents"] += 1
        counts["windows"] += 1
        counts["canonical_nll"] += window.canonical_nll
        tick(done)
    writer.close()
    return counts
