"""A line or document beyond all measure is left out, counted and said, in memory that its length does not decide."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus import reader
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
