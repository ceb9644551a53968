"""`plan`: the corpus cut into slices, the units of all later work; and all that was left out of it, said."""

from collections import Counter
from collections.abc import Iterator, Sequence

from bytecache.pipeline.commands.teacher import known_start, start_line
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan.editions import change_between
from bytecache.pipeline.plan.index import Plan, read_plan
from bytecache.pipeline.units.progress import human_bytes
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus import reader
from bytecache.stages.corpus.files import File, corpus_files, ending_of
from bytecache.stages.corpus.tally import listed

MOST_NAMES = 5
"""Ignored files that are named."""
MUCH_HELD_OUT = 0.5
"""Share of the text beyond which what is held out is more than anyone asks for."""


def plan(context: Context, *, grow: bool = True) -> tuple[Plan, bool]:
    """Cut the corpus into slices; returns the plan and whether it is new.

    `grow`: a corpus that changed since makes a new edition, else it is refused.

    Raises what `make_plan` does, and InputError or ConfigError where the student could not be trained on any of it.
    """
    context.store.sweep()
    before = _whole_plan(context)
    planned, new = planning.make_plan(context.store, context.settings, context.stop, grow=grow)
    context.save_config("plan/config.toml", changed=new, of=planned.hash)
    corpus = planned.corpus
    skipped = f", {corpus['n_empty_skipped']} empty ones skipped" if corpus["n_empty_skipped"] else ""
    context.say(
        f"plan: {'new' if new else 'unchanged'}, {corpus['n_documents']} documents{skipped}, "
        f"{human_bytes(corpus['n_bytes'])} of text in {len(planned.sizes)} units "
        f"({planned.n_heldout} held out)"
    )
    if before is not None and before.edition < planned.edition:
        context.say(
            f"plan: edition {planned.edition} of a corpus that changed, {change_between(before, planned).words()}"
        )
        context.say("plan: nothing of the editions before is deleted; what is unchanged is not computed again")
    if planned.edition > 1:
        from bytecache.pipeline.commands.convert import requeue_parts

        if requeued := requeue_parts(context, planned):
            context.say(
                f"plan: {len(requeued)} dump parts that were deleted after conversion are needed again beside what "
                "changed; `bytecache teacher` makes them"
            )
    files, ignored = corpus_files(context.settings.corpus)
    if line := understood(context.settings.corpus, files):
        context.say(f"plan: {line}")
    for line in left_out(planned, context.settings.corpus, files, ignored):
        context.say(f"plan: {line}")
    if record := known_start(context, str(planned.settings.get("kind", "text"))):
        context.say(f"plan: {start_line(record)}")
    if planned.settings.get("kind") == "chat":
        from bytecache.pipeline.commands.check import check_student_reads

        for line in check_student_reads(context, planned):
            context.say(f"plan: {line}")
    return planned, new


def _whole_plan(context: Context) -> Plan | None:
    try:
        return read_plan(context.store)
    except IntegrityError:
        return None  # planning says what is wrong with it


def understood(settings: Corpus, files: Sequence[File]) -> str:
    """What was taken for documents, by the files' kinds; "" for a built-in corpus, which has none."""
    if not files:
        return ""
    endings = Counter(ending_of(file.name) for file in files)
    kinds = ", ".join(f"{ending} ({count})" for ending, count in sorted(endings.items()))
    if settings.kind != "text":
        return f"read as records of corpus.kind = {settings.kind!r}: {kinds}"
    if set(endings) == {".txt"}:
        return f"read as text, in documents by {settings.text_split}: {kinds}"
    return f"read as text, the field {settings.text_field!r} of each record: {kinds}"


def left_out(planned: Plan, settings: Corpus, files: Sequence[File], ignored: Sequence[str]) -> Iterator[str]:
    """What of the corpus is not in the plan, or not in training, a line each; `files`, `ignored`: of `corpus_files`."""
    corpus = planned.corpus
    passed = corpus.get("passed_over", {})
    if corpus.get("is_cut"):
        yield f"the first {human_bytes(corpus['n_bytes'])} of more (corpus.max_bytes = {settings.max_bytes}; 0 = all)"
    if corpus.get("n_files_ignored"):
        more = ", ..." if len(ignored) > MOST_NAMES else ""
        yield f"{corpus['n_files_ignored']} files of other kinds ignored: {', '.join(ignored[:MOST_NAMES])}{more}"
    if unanswered := passed.get("unanswered"):
        yield (
            f"{sum(unanswered.values())} records left out, no message of role assistant; "
            f"roles found: {listed(unanswered)}"
        )
    if overlong := passed.get("overlong"):
        yield (
            f"warning: {sum(overlong.values())} documents left out, longer than {reader.MAX_DOCUMENT} bytes: "
            f"{listed(overlong)}; split them"
        )
    if layouts := passed.get("layouts"):
        yield f"records understood as {listed(layouts)}"
    if unlearned := passed.get("unlearned"):
        yield f"answers that are read and not learned, their words being the template's: {listed(unlearned)}"
    if strange := passed.get("strange"):
        yield f"roles that a chat template may not know, by records: {listed(strange)}"
    if unread := passed.get("unread"):
        yield f"fields that are not read, by records: {listed(unread)}"
    yield from _lopsided(planned, settings, files)


def _lopsided(planned: Plan, settings: Corpus, files: Sequence[File]) -> Iterator[str]:
    heldout = sum(planned.sizes[index] for index in planned.index.heldout)
    if settings.heldout_fraction and not planned.n_heldout:
        yield f"nothing is held out, all is for training: too few documents that differ{_split_hint(settings, files)}"
    elif heldout > MUCH_HELD_OUT * planned.n_bytes:
        yield (
            f"warning: {human_bytes(heldout)} of {human_bytes(planned.n_bytes)} are held out, since a few documents "
            f"are most of the text{_split_hint(settings, files)}"
        )


def _split_hint(settings: Corpus, files: Sequence[File]) -> str:
    """What makes more documents, where that is possible."""
    if settings.text_split == "file" and any(file.name.endswith(".txt") for file in files):
        return '; corpus.text_split = "paragraphs" makes more documents of a .txt file'
    return ""
