"""`check`: whether a run could be made at all, before any work: corpus, teacher, student, each with its refusal.

Nothing is written but caches, no engine starts and no weight is read but to merge a `teacher.adapter`. `run` looks at
teacher and student first; `train`, `teacher` and `plan` check what they are about to use.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bytecache.pipeline.context import Context
from bytecache.schemas.errors import BytecacheError, InputError
from bytecache.schemas.files import arrow_path
from bytecache.schemas.settings import is_transfer

if TYPE_CHECKING:
    from bytecache.pipeline.plan.index import Plan

SAMPLE = 64
"""Documents of a plan that the student's chat template is tried on."""


def check(context: Context) -> None:
    """Say of corpus, teacher and student that they can be used, or raise what is wrong with the first that cannot.

    Every one is looked at: further refusals are said before the first one is raised.
    """
    refusals: list[BytecacheError] = []
    for name, look in (("corpus", _check_corpus), ("teacher", _check_teacher), ("student", _check_student)):
        try:
            context.say(f"check: {name}: {look(context)}")
        except BytecacheError as error:
            refusals.append(error)
    for further in refusals[1:]:
        context.say(f"check: also: {further}")
    if refusals:
        raise refusals[0]


def _check_corpus(context: Context) -> str:
    from bytecache.stages.corpus.files import corpus_files
    from bytecache.stages.corpus.reader import CorpusReader

    corpus = context.settings.corpus
    if context.settings.dataset.source:
        return f"not used, targets come from {context.settings.dataset.source}"
    files, ignored = corpus_files(corpus)
    first = next(CorpusReader(corpus).documents(files))
    others = f", {len(ignored)} files of other kinds" if ignored else ""
    return f"{corpus.source} can be read (its first document is {first.doc_id!r}{others})"


def _check_teacher(context: Context) -> str:
    from bytecache.stages.teacher.check import check_teacher
    from bytecache.stages.teacher.identity import fit_context, vocabulary_of
    from bytecache.stages.tokens.chat import Template

    settings = context.settings.teacher.resolved()
    if context.settings.dataset.source:
        return "not used"
    folder = check_teacher(settings)
    window, _ = fit_context(settings, folder)
    vocabulary = vocabulary_of(settings, folder)
    if context.settings.corpus.kind == "chat":
        template = Template.open(folder, vocabulary, setting="teacher.model")
        if template.end_id is not None:
            template.require_end(vocabulary)
    return f"{settings.model}, {vocabulary.size} tokens ({vocabulary.family}), windows of {window} tokens"


def _check_student(context: Context) -> str:
    from bytecache.stages.student.check import check_student

    settings = context.settings
    check_student(settings.student, settings.train, chat=settings.corpus.kind == "chat")
    student = settings.student
    if is_transfer(student):
        return f"{student.model} under another tokenizer, {student.tokenizer}"
    return student.model or f"a new one, {student.layers} layers of {student.hidden_size}"


def check_student_reads(context: Context, planned: "Plan") -> Iterator[str]:
    """Try the student's chat template on documents of a plan of conversations; yields what of them it cannot read.

    Raises InputError where it can read none, ConfigError where it has no template that can be used.
    """
    import json

    import pyarrow.parquet as pq

    from bytecache.stages.student.check import open_vocabulary
    from bytecache.stages.tokens import misfits
    from bytecache.stages.tokens.chat import Template, encode_answer
    from bytecache.stages.tokens.vocab import Misfit

    opened = open_vocabulary(context.settings.student)
    if opened is None:
        return
    setting, folder, vocabulary = opened
    template = Template.open(folder, vocabulary, setting=setting)
    reasons: Counter[str] = Counter()
    tried = 0
    for unit in planned.units:
        if tried >= SAMPLE:
            break
        piece = arrow_path(context.store.get_path(unit.slice))
        table = pq.read_table(piece, columns=["text", "context"]).slice(0, SAMPLE - tried)
        for text, before in zip(table.column("text").to_pylist(), table.column("context").to_pylist(), strict=True):
            tried += 1
            if json.loads(before) and isinstance(misfit := encode_answer(vocabulary, template, before, text), Misfit):
                reasons[misfit.reason] += 1
        context.store.release(unit.slice)
    failed = sum(reasons.values())
    if failed and failed == tried:
        raise InputError(
            f"{setting}: the student can read none of the first {tried} documents because {misfits.words(reasons)}; "
            f"{misfits.remedy(reasons, 'student')}"
        )
    if failed:
        yield f"{failed} of the first {tried} documents cannot be read by the student because {misfits.words(reasons)}"
