"""Documents: from JSONL (plain, gzip or zstd), Parquet, Arrow or text files, folders of them, or the hub; or a manual.

One streaming pass in a fixed order (folders: by path, recursively; files: as they lie), never more than one
document and one Parquet batch in memory. A document is kept to the byte: no newline or Unicode normalisation.
Document ids are the source's `id`/`doc_id` where it has one, else the file and a hash of the record: an id never
depends on what lies before the document.
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus import conversations, hub
from bytecache.stages.corpus.containers import COMPRESSED, DAMAGED_LINES, TABLES, Table, open_compressed
from bytecache.stages.corpus.conversations import ID_FIELDS, KNOWN_ROLES, roles_of
from bytecache.stages.corpus.files import SUFFIXES, File, corpus_files
from bytecache.stages.corpus.line_range import LineRange
from bytecache.stages.corpus.tally import Tally, listed, note
from bytecache.stages.corpus.text_files import decode, lines_of, paragraph_runs, pydoc_topics

MAX_DOCUMENT = 1 << 26
"""Bytes of a document, and of a line of JSON that holds one: a longer one is left out, counted and said. A document
costs its readers ten times its length in memory, and a megabyte of .gz can hold a gigabyte of it."""
PIECE = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """`text` always encodes to UTF-8 and is never empty; `doc_id` is the source's own.

    `context`: what is read before the text and not learned (`stages.corpus.conversations`); empty for plain text.
    """

    doc_id: str
    text: str
    context: str = ""


class CorpusReader:
    """Iterates the documents of `corpus.source`, or of some of its files, and counts them into `tally`.

    Iterating raises InputError, naming file, line or row, byte offset and remedy, on: a missing file, no text
    at all, bytes that are not UTF-8, malformed JSON, a missing text field, unpaired surrogates, truncated
    gzip or Parquet, a text file above `MAX_DOCUMENT` that is to be one document.
    """

    def __init__(self, corpus: Corpus, tally: Tally | None = None) -> None:
        self.corpus = corpus
        self.tally = tally or Tally()
        self._ignored = frozenset(corpus.ignore_fields.split())

    def __iter__(self) -> Iterator[Document]:
        yield from self.documents(corpus_files(self.corpus)[0])

    def documents(self, files: Sequence[File]) -> Iterator[Document]:
        """The documents of the corpus, whose files are known already; raises as iterating does."""
        yield from (document for document, _ in self.encoded(files))
        self.refuse_nothing()

    def encoded(self, files: Sequence[File]) -> Iterator[tuple[Document, bytes]]:
        """The documents of these files (none: of the built-in corpus), each with its text in UTF-8; up to max_bytes.

        What `tally` holds already was read before these. The end is the border nearest `corpus.max_bytes`, after one
        document at least.
        """
        limit, tally = self.corpus.max_bytes, self.tally
        documents = self._documents(files)
        for document, raw in documents:
            if limit and tally.n_documents and abs(tally.n_bytes + len(raw) - limit) > abs(limit - tally.n_bytes):
                tally.is_cut = True
                return
            tally.n_documents += 1
            tally.n_bytes += len(raw)
            yield document, raw
            if limit and tally.n_bytes >= limit:
                # Empty documents behind the end are not counted.
                counted = tally.empty, Counter(tally.unanswered)
                tally.is_cut = _goes_on(documents)
                tally.empty, tally.unanswered = counted
                return

    def _documents(self, files: Sequence[File]) -> Iterator[tuple[Document, bytes]]:
        """Those with text that are not too long."""
        for where, doc_id, text, context in self._raw(files):
            if not text:
                self.tally.empty += 1
                continue
            if context:
                _encode(context, where)
            raw = _encode(text, where)
            if len(raw) + len(context) > MAX_DOCUMENT:
                note(self.tally.overlong, Path(where.partition(", ")[0]).name)
                continue
            yield Document(doc_id, text, context), raw

    def refuse_nothing(self) -> None:
        """Raise InputError where all that was read holds no document."""
        tally = self.tally
        if tally.n_documents:
            return
        if tally.unanswered:
            raise InputError(
                f"corpus {self.corpus.source}: no message of role assistant in {sum(tally.unanswered.values())} "
                f"records, so there is nothing to learn; roles found: {listed(tally.unanswered)}; name who answers "
                "`assistant`, and who asks `user`"
            )
        if tally.overlong:
            raise InputError(
                f"corpus {self.corpus.source} holds no text of at most {MAX_DOCUMENT} bytes: "
                f"{sum(tally.overlong.values())} longer documents were left out, {tally.empty} are empty: "
                f"{listed(tally.overlong)}; split them"
            )
        raise InputError(
            f"corpus {self.corpus.source} holds no text ({tally.empty} empty documents); "
            "name a source with text in corpus.source"
        )

    def _raw(self, files: Sequence[File]) -> Iterator[tuple[str, str, str, str]]:
        """(place for messages, id, text, context) of every document, empty ones included."""
        if not files:
            yield from ((*topic, "") for topic in pydoc_topics(MAX_DOCUMENT // 2))
        for file in files:
            if file.path.startswith(hub.PREFIX):
                yield from self._hub(file)
                continue
            path = Path(file.path)
            try:
                yield from self._read_file(path, file)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be read: {error.strerror or error}; check the file and its permissions"
                ) from error

    def _read_file(self, path: Path, file: File) -> Iterator[tuple[str, str, str, str]]:
        name = file.name
        if name.endswith(".jsonl"):
            if not path.stat().st_size:
                yield str(path), name, "", ""  # counted as an empty document
            with path.open("rb") as stream:
                if file.end is None:
                    yield from self._jsonl(stream, path, name)
                else:
                    yield from self._line_range(stream, path, file)
        elif name.endswith(tuple(COMPRESSED)):
            with open_compressed(path) as stream:
                yield from self._jsonl(stream, path, name)
        elif name.endswith(TABLES):
            yield from self._table(path, name)
        elif name.endswith(".txt"):
            if self.corpus.kind != "text":
                raise InputError(f"{path}: corpus.kind = {self.corpus.kind!r} needs JSONL or Parquet; convert the file")
            yield from ((*paragraph, "") for paragraph in self._txt(path, name))
        else:
            raise InputError(f"{path}: unknown kind of corpus file; known: {', '.join(SUFFIXES)}")

    def _line_range(self, stream: BinaryIO, path: Path, file: File) -> Iterator[tuple[str, str, str, str]]:
        try:
            yield from self._jsonl(LineRange(stream, file.begin, file.end or file.begin), path, file.name)
        except InputError:
            stream.seek(0)
            for _ in self._jsonl(stream, path, file.name):  # finds the same fault, with its number in the whole file
                pass
            raise

    def _jsonl(self, stream: BinaryIO | LineRange, path: Path, name: str) -> Iterator[tuple[str, str, str, str]]:
        field = self.corpus.text_field
        offset, number = 0, 0
        while True:
            try:
                line = stream.readline(MAX_DOCUMENT + 1)
                skipped = _skip_line(stream, line) if len(line) > MAX_DOCUMENT else 0
            except (*DAMAGED_LINES, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise InputError(
                    f"{path}: truncated or damaged {COMPRESSED.get(path.suffix, 'file')} after line {number} (byte "
                    f"{offset} of the text): {error}; fetch the file again"
                ) from None
            if not line:
                return
            number += 1
            where = f"{path}, line {number} (byte {offset})"
            if len(line) > MAX_DOCUMENT:
                offset += len(line) + skipped
                note(self.tally.overlong, name)
                continue
            raw = line.removeprefix(_BOM) if number == 1 else line
            offset += len(line)
            if not raw.strip():
                continue
            text = decode(raw, path, number, offset - len(raw))
            # What has the text's name once has it twice in no object; conversations repeat names, and are looked at.
            once = self.corpus.kind == "text" and text.count(f'"{field}"') < 2
            record = _parse_record(text, where, field, once=once)
            if self.corpus.kind != "text":
                yield from self._turns(record, _content_id(name, raw), where)
                continue
            yield self._text(record, _content_id(name, raw), where)

    def _text(self, record: dict[str, Any], fallback: str, where: str) -> tuple[str, str, str, str]:
        """A record of text as (place, id, text, context). Raises InputError."""
        field = self.corpus.text_field
        if field not in record:
            raise InputError(f"{where}: no field {field!r}; {_offer(field, list(record))}")
        value = record[field]
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"{where}: field {field!r} is {type(value).__name__}, expected text; name another corpus.text_field"
            )
        self._note_unread(record, {field})
        return where, _record_id(record, fallback, where), value or "", ""

    def _hub(self, file: File) -> Iterator[tuple[str, str, str, str]]:
        for row, record in hub.records(hub.HubCorpus.parse(file.path)):
            where = f"{file.path}, row {row}"
            if self.corpus.kind == "text":
                text = record.get(self.corpus.text_field)
                raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
                yield self._text(record, _content_id(file.name, raw), where)
            else:
                yield from self._turns(record, _content_id(file.name, repr(record).encode()), where)

    def _note_unread(self, record: Iterable[str], used: set[str]) -> None:
        for name in record:
            if name not in used and name not in ID_FIELDS:
                note(self.tally.unread, name)

    def _turns(self, record: dict[str, Any], fallback: str, where: str) -> Iterator[tuple[str, str, str, str]]:
        doc_id = _record_id(record, fallback, where)
        n_turns = 0
        for turn in conversations.turns(record, self.corpus.kind, where, self._ignored):
            n_turns += 1
            yield where, doc_id + turn.suffix, turn.text, turn.context
        note(self.tally.layouts, conversations.layout(record, self.corpus.kind))
        for reason, count in conversations.unlearned(record).items():
            note(self.tally.unlearned, reason, count)
        roles = roles_of(record)
        if not n_turns:
            note(self.tally.unanswered, ", ".join(roles))
        for role in roles if n_turns else ():
            if role not in KNOWN_ROLES:
                note(self.tally.strange, role)
        for name in conversations.unused(record):
            if name in self._ignored or isinstance(record[name], int | float):
                note(self.tally.unread, name)

    def _table(self, path: Path, name: str) -> Iterator[tuple[str, str, str, str]]:
        field = self.corpus.text_field
        with Table(path).opened() as (schema, batches):
            columns = schema.names
            if self.corpus.kind == "text":
                _check_text_column(schema, field, path)
                wanted = [field, *(column for column in ID_FIELDS if column in columns and column != field)]
            else:
                wanted = [column for column in columns if column not in self._ignored]
            if repeated := sorted({column for column in wanted if columns.count(column) > 1}):
                raise InputError(f"{path}: more than one column {repeated[0]!r}; rename or remove one")
            unread = [column for column in columns if column not in wanted]
            for row, record in batches.records(wanted):
                where = f"{path}, row {row}"
                if self.corpus.kind == "text":
                    text = record[field] or ""
                    yield where, _record_id(record, _content_id(name, text.encode()), where), text, ""
                else:
                    yield from self._turns(record, _content_id(name, repr(record).encode()), where)
                self._note_unread(unread, set())

    def _txt(self, path: Path, name: str) -> Iterator[tuple[str, str, str]]:
        if self.corpus.text_split == "file":
            if path.stat().st_size > MAX_DOCUMENT:
                raise InputError(f'{path}: larger than {MAX_DOCUMENT} bytes; set corpus.text_split = "paragraphs"')
            raw = path.read_bytes()
            text = decode(raw, path, 1, 0).removeprefix("\ufeff")
            yield str(path), name, text
            return
        with path.open("rb") as stream:
            for first, piece in paragraph_runs(lines_of(stream, path), MAX_DOCUMENT // 2):
                yield f"{path}, line {first}", _content_id(name, piece.encode()), piece


def _skip_line(stream: BinaryIO | LineRange, line: bytes) -> int:
    """Read to the end of the line that begins like this, keeping nothing; returns how many bytes."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(PIECE)
        skipped += len(line)
    return skipped


def _parse_record(text: str, where: str, field: str, *, once: bool) -> dict[str, Any]:
    """The object on a line; `once`: nobody need look for repeated keys. Raises InputError."""
    try:
        record: Any = json.loads(text) if once else json.loads(text, object_pairs_hook=strict_json.distinct)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; one JSON object per line is expected"
        ) from None
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        why = "a number of thousands of digits" if "set_int_max_str_digits" in why else why
        raise InputError(f"{where}: JSON that cannot be read ({why}); correct or remove the line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, expected an object with a field {field!r}")
    return record


def _check_text_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise InputError(f"{path}: no column {field!r}; {_offer(field, schema.names)}")
    kind = schema.field(schema.names.index(field)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{path}: column {field!r} is {kind}, expected text; name another corpus.text_field")


def _goes_on(documents: Iterator[tuple[Document, bytes]]) -> bool:
    """Whether there is another document, be it one that cannot be read."""
    try:
        return next(documents, None) is not None
    except InputError:
        return True


def _encode(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: unpaired surrogate \\u{ord(text[error.start]):04x} at character {error.start} "
            "cannot be UTF-8; repair or remove the document"
        ) from None


def _content_id(name: str, raw: bytes) -> str:
    """The id of a record without one: its file and its content, so that it stays the same wherever it moves to."""
    return f"{name}:{hashlib.sha256(raw.strip()).hexdigest()[:16]}"


def _record_id(record: dict[str, Any], fallback: str, where: str) -> str:
    for field in ID_FIELDS:
        value = record.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            _encode(str(value), f"{where}, field {field!r}")
            return str(value)
    return fallback


def _offer(field: str, present: list[str]) -> str:
    near = difflib.get_close_matches(field, present, n=1, cutoff=0.3)
    names = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
    if {"messages", "conversations"} & set(present) or any(set(pair) <= set(present) for pair in conversations.PAIRS):
        return f'present: {names}; set corpus.kind = "chat"'
    return f"present: {names or 'nothing'}; set corpus.text_field" + (f" = {near[0]!r}" if near else "")
