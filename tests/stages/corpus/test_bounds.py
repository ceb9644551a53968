"""A line or document beyond all measure is left out, counted and said, in memory that its length does not decide."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus import containers, reader
from bytecache.stages.corpus.files import corpus_files
from bytecache.stages.corpus.reader import CorpusReader
from tests.support.command_line import bytecache


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a document may have here."""
    monkeypatch.setattr(reader, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(reader, "PIECE", 64)
    return 1000


def read(source: Path, **more: object) -> tuple[list[str], dict[str, int]]:
    corpus = CorpusReader(Corpus(source=str(source), max_bytes=0, **more))  # type: ignore[arg-type]
    return [document.text for document in corpus], dict(corpus.tally.overlong)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_beyond_the_limit_are_left_out(suffix: str, end: str, short: int, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("first", "x" * 5000, "middle", "y" * 900, "z" * 1001)]
    raw = ("\n".join(lines) + end).encode()
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    texts, overlong = read(path)
    assert texts == ["first", "middle", "y" * 900] and overlong == {f"c.jsonl{suffix}": 2}


def test_rows_and_answers_beyond_the_limit_are_left_out(short: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "x" * 1001, "two"]}), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == (["one", "two"], {"c.parquet": 1})
    rows = {"prompt": ["p", "p" * 995, "p"], "response": ["r", "r" * 10, "s"]}
    pq.write_table(pa.table(rows), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", kind="completion") == (["r", "s"], {"d.parquet": 1})


def test_it_is_said_by_the_plan(short: int, world: Path) -> None:
    with (world / "corpus.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "x" * 5000}) + "\n")
    done = bytecache("plan", "--jobs", "1")
    assert done.exit_code == 0, done.output
    assert "1 documents left out, longer than 1000 bytes: corpus.jsonl (1); split them" in done.output


def test_a_line_that_ends_in_damage_is_damage(short: int, tmp_path: Path) -> None:
    raw = gzip.compress(os.urandom(4000).hex().encode())
    (tmp_path / "c.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match="truncated or damaged gzip"):
        read(tmp_path / "c.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_pipes_and_devices_are_no_corpus(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="is a named pipe, not a regular file"):
            corpus_files(Corpus(source=str(source)))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is a device"):
        corpus_files(Corpus(source=str(tmp_path)))


@pytest.mark.slow
def test_a_line_of_300_mb_in_a_small_file_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    """Measured before: 4.2 GB for a file of 1.4 MB."""
    path = tmp_path / "c.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "one"}\n{"text": "')
        for _ in range(300):
            stream.write(b"a" * (1 << 20))
        stream.write(b'"}\n{"text": "two"}\n')
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from bytecache.schemas.settings import Corpus\n"
        "from bytecache.stages.corpus.reader import CorpusReader\n"
        "reader = CorpusReader(Corpus(source=sys.argv[1], max_bytes=0))\n"
        "texts = [one.text for one in reader]\n"
        # Not ru_maxrss, which a child takes over from the process that started it.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "print(texts, reader.tally.overlong.total(), int(peak.group(1)) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    said, megabytes = done.stdout.rsplit(" ", 1)
    assert said == "['one', 'two'] 1" and int(megabytes) < 1000


def test_a_page_beyond_all_documents_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["x" * 1_000_000, "y"], "other": ["z" * 3_000_000] * 2}), path)
    monkeypatch.setattr(containers, "_PAGE", 2_000_000)
    assert read(path)[0] == ["x" * 1_000_000, "y"]  # the other column is not read
    monkeypatch.setattr(containers, "_PAGE", 900_000)
    with pytest.raises(InputError, match=r"row group 0 has a page of 1000\d{3} bytes.*smaller pages"):
        read(path)


def test_rows_that_repeat_one_large_value_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary says a value once, however many rows have it: together they could be as much as one likes."""
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": pa.array(["x" * 100_000] * 200).dictionary_encode()}), path)
    monkeypatch.setattr(containers, "_PAGE", 300_000)
    with pq.ParquetFile(path) as file:
        sizes = [batch.num_rows for batch in containers._groups(path, file, ["text"])]
    assert sum(sizes) == 200 and max(sizes) == 2
    assert len(read(path)[0]) == 200


def arrow(table: pa.Table, kind: str, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with opened(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=100)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_a_batch_of_an_arrow_file_is_as_large_as_its_message_says(
    kind: str, compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pa.array(["x" * 100_000] * 150 + ["y"] * 150)
    path = tmp_path / "c.arrow"
    path.write_bytes(arrow(pa.table({"text": texts, "other": texts.dictionary_encode()}), kind, compression))
    assert read(path)[0] == texts.to_pylist()
    monkeypatch.setattr(containers, "_BATCH", 9_000_000)
    if compression:
        assert path.stat().st_size < 1_000_000
        with pytest.raises(
            InputError, match=r"c\.arrow: a batch would decompress to 1000\d{4} bytes, .*fewer rows a batch"
        ):
            read(path)
    else:  # as large as the file
        assert read(path)[0] == texts.to_pylist()


def test_arrow_messages_that_are_none_are_refused(tmp_path: Path) -> None:
    raw = arrow(pa.table({"text": ["some words"] * 30}), "stream", "zstd")
    draw, path, refused = random.Random(0), tmp_path / "c.arrow", 0
    for _ in range(300):
        broken = bytearray(raw)
        for _ in range(draw.choice([1, 4, 16])):
            broken[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(broken[: draw.choice([len(raw), draw.randrange(len(raw))])])
        try:
            read(path)
        except InputError:
            refused += 1
    assert refused > 150


def test_a_corpus_of_nothing_else_says_so(short: int, tmp_path: Path) -> None:
    """Not that it has no text: it has too much of it at once."""
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "x" * (2 * short)}) + "\n")
    with pytest.raises(InputError, match=r"1 longer documents were left out.*c\.jsonl \(1\)"):
        read(path)
