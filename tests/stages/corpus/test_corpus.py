"""Corpora: every source gives the same documents, and every damaged one a message with the place and the remedy."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.files import corpus_files
from bytecache.stages.corpus.line_range import LineRange
from bytecache.stages.corpus.reader import CorpusReader, Document

TEXTS = ["first\r\nline", "", "zweiter ü\u2028", "a \u0000 b", "   "]


def read(source: Path | str, **keys: object) -> list[Document]:
    return list(CorpusReader(Corpus.model_validate({"source": str(source), "max_bytes": 0, **keys})))


def jsonl(path: Path, records: list[object]) -> Path:
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".zst":
        raw = pa.compress(raw, codec="zstd", asbytes=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def arrow(path: Path, table: pa.Table) -> Path:
    """A stream of small batches, as `datasets.save_to_disk` writes it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def refusal(source: Path | str, **keys: object) -> str:
    with pytest.raises(InputError) as caught:
        read(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet", "c.arrow", "file.arrow"])
def test_texts_survive_to_the_byte_and_empty_ones_are_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = pa.table({"text": [*TEXTS, None], "other": range(6)})
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name == "file.arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".arrow"):
        arrow(path, table)
    else:
        jsonl(path, [{"text": text} for text in [*TEXTS, None]])
    reader = CorpusReader(Corpus(source=str(path)))
    documents = list(reader)
    assert [document.text for document in documents] == [text for text in TEXTS if text]
    assert (reader.tally.n_documents, reader.tally.empty) == (4, 2)
    assert reader.tally.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert len({document.doc_id for document in documents}) == 4


def test_ids_are_those_of_the_source(tmp_path: Path) -> None:
    ids: list[object] = ["a", "a", 7, None, ""]
    path = jsonl(tmp_path / "c.jsonl", [{"id": name, "text": "x"} for name in ids])
    names = [document.doc_id for document in read(path)]
    assert names[:3] == ["a", "a", "7"]
    assert len(set(names[2:])) == 3
    assert all(re.fullmatch(r"c\.jsonl:[0-9a-f]{16}", name) for name in names[3:])


@pytest.mark.parametrize("form", ["jsonl", "parquet", "paragraphs", "chat"])
def test_ids_do_not_depend_on_what_lies_before_a_document(tmp_path: Path, form: str) -> None:
    def names(numbers: list[int]) -> list[str]:
        texts = [f"{number} " * 3000 + "\n\n" for number in numbers]
        path = tmp_path / {"parquet": "c.parquet", "paragraphs": "c.txt"}.get(form, "c.jsonl")
        if form == "parquet":
            pq.write_table(pa.table({"text": texts}), path)
        elif form == "paragraphs":
            path.write_text("".join(texts))
        else:
            key = {"jsonl": "text", "chat": "prompt"}[form]
            path.write_text("".join(json.dumps({key: text, "response": "yes"}) + "\n" for text in texts))
        keys = {"paragraphs": {"text_split": "paragraphs"}, "chat": {"kind": "chat"}}.get(form, {})
        return [document.doc_id for document in read(path, **keys)]

    before, after = names([1, 2, 3, 4]), names([9, 1, 3, 4])
    assert len(set(before)) == 4
    assert (after[1], after[2:]) == (before[0], before[2:])


def test_every_line_is_in_one_range(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = [b"\n" if i % 5 == 0 else b"x" * (i * 7 % 11) + b"\n" for i in range(40)] + [b"last"]
    path.write_bytes(b"".join(lines))
    size = path.stat().st_size
    for step in (1, 2, 3, 7, 50, size):
        found = []
        for begin in range(0, size, step):
            with path.open("rb") as stream:
                some = LineRange(stream, begin, min(begin + step, size))
                part = list(iter(lambda some=some: some.readline(1 << 20), b""))
            if begin:
                assert part[0] == b"\n", "no line of a range is the first of its file"
            found += part[1:] if begin else part
        assert found == lines


def test_folder_is_read_in_path_order_without_hidden_or_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "z.txt": "3",
        "b/a.txt": "2",
        "a.txt": "1",
        "a.md": "no",
        ".git/x.txt": "no",
        ".h.txt": "no",
    }.items():
        (tmp_path / name).write_text(text)
    reader = CorpusReader(Corpus(source=str(tmp_path)))
    assert list(reader) == [Document("a.txt", "1"), Document("b/a.txt", "2"), Document("z.txt", "3")]
    assert corpus_files(reader.corpus)[1] == ["a.md"]


def test_paragraphs_join_to_the_file(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "ä" * (37 * i % 900) for i in range(60)) + "\r\n\r\nlast, no newline"
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    documents = read(path, text_split="paragraphs")
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 3
    assert all(4096 <= len(document.text.encode()) < 8192 for document in documents[:-1])
    assert [document.text for document in read(path)] == [text]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert [document.text for document in read(tmp_path)] == ["hello", "hello"]


def test_max_bytes_stops_at_the_nearest_border(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [{"text": "x" * size} for size in (100, 100, 100)])
    assert [len(read(path, max_bytes=limit)) for limit in (1, 100, 149, 151, 200, 260, 1000)] == [1, 1, 1, 2, 2, 3, 3]


def test_builtin_corpus_is_shuffled_and_its_prefix_stable() -> None:
    documents = read("builtin:pydoc-topics", max_bytes=0)
    names = [document.doc_id for document in documents]
    assert names != sorted(names)
    assert sum(len(document.text) for document in documents) > 300_000
    part = read("builtin:pydoc-topics", max_bytes=100_000)
    assert part == documents[: len(part)]
    assert 60_000 < sum(len(document.text.encode()) for document in part) < 140_000


def test_unknown_builtin_is_refused() -> None:
    with pytest.raises(ConfigError, match="builtin:pydoc-topics"):
        read("builtin:wikipedia")


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2 (byte 14)", "not JSON"]),
        ("c.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2 (byte 24)", "0xff", "UTF-8"]),
        ("c.jsonl", b'\n{"text": "a\\ud800b"}\n', ["line 2 (byte 1)", "\\ud800", "character 1"]),
        ("c.jsonl", b'{"id": "\\udc00", "text": "a"}\n', ["line 1", "\\udc00", "'id'"]),
        ("c.jsonl", b'{"body": "a", "n": 1}\n', ["no field 'text'", "body, n", "corpus.text_field"]),
        ("c.jsonl", b'{"text": 3}\n', ["field 'text' is int"]),
        ("c.jsonl", b"[1]\n", ["JSON list", "expected an object"]),
        ("c.jsonl", b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
        ("c.jsonl", b'{"text": ""}\n', ["holds no text (1 empty documents)"]),
        ("c.jsonl", b"", ["holds no text"]),
        ("c.txt", b"fine\nb\xe9d\n", ["line 2 (byte 6)", "0xe9"]),
        ("c.parquet", b"PAR1 no", ["truncated or damaged Parquet"]),
        ("c.csv", b"a,b", ["unknown kind", ".jsonl"]),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, raw: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    message = refusal(path)
    for part in [str(path), *expected]:
        assert part in message


def test_truncated_containers(tmp_path: Path) -> None:
    whole = jsonl(tmp_path / "whole.jsonl.gz", [{"text": f"{i} " * 300} for i in range(200)]).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged gzip after line" in refusal(tmp_path / "c.jsonl.gz")
    whole = jsonl(tmp_path / "whole.jsonl.zst", [{"text": f"{i * i} " * 300} for i in range(2000)]).read_bytes()
    for cut in (len(whole) // 2, len(whole) - 4, 3):
        (tmp_path / "c.jsonl.zst").write_bytes(whole[:cut])
        assert "truncated or damaged zstd after line" in refusal(tmp_path / "c.jsonl.zst")
    (tmp_path / "c.jsonl.zst").write_bytes(b"not zstd at all")
    assert "truncated or damaged zstd after line 0" in refusal(tmp_path / "c.jsonl.zst")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "d.jsonl.gz").write_bytes(flipped)
    assert "gzip" in refusal(tmp_path / "d.jsonl.gz") or "not JSON" in refusal(tmp_path / "d.jsonl.gz")
    pq.write_table(pa.table({"text": ["a" * 5000, "b" * 5000]}), tmp_path / "c.parquet", compression="none")
    raw = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(raw[:3000])
    assert "truncated or damaged Parquet" in refusal(tmp_path / "c.parquet")


def test_parquet_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "c.parquet")
    assert "no column 'text'; present: body, n" in refusal(tmp_path / "c.parquet")
    assert "column 'n' is int64" in refusal(tmp_path / "c.parquet", text_field="n")
    assert [document.text for document in read(tmp_path / "c.parquet", text_field="body")] == ["a"]


def test_missing_sources(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none")
    assert "holds none of .jsonl" in refusal(tmp_path)


def test_a_folder_of_save_to_disk_is_read_without_its_copies(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        arrow(tmp_path / split / "data-00000-of-00001.arrow", pa.table({"text": [f"{split} {i}" for i in range(9)]}))
        (tmp_path / split / "state.json").write_text("{}")
    arrow(tmp_path / "train" / "cache-0a1b.arrow", pa.table({"text": ["a copy"]}))
    reader = CorpusReader(Corpus(source=str(tmp_path), max_bytes=0))
    assert [document.text for document in reader] == [f"{split} {i}" for split in ("test", "train") for i in range(9)]


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    whole = arrow(tmp_path / "whole.arrow", pa.table({"text": ["x" * 100] * 50})).read_bytes()
    for cut in (0, 5, len(whole) // 2):
        (tmp_path / "c.arrow").write_bytes(whole[:cut])
        assert "truncated or damaged Arrow file after row" in refusal(tmp_path / "c.arrow")


def test_a_key_that_appears_twice_is_refused(tmp_path: Path) -> None:
    """A parser keeps one of the two texts, and nobody would know that there was another."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    assert "line 2" in refusal(path) and "'text' appears twice" in refusal(path)
    path.write_text(
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
    )
    assert "'content' appears twice" in refusal(path, kind="chat")
    path.write_text('{"text": "a", "more": {"text": "b"}}\n')
    assert [document.text for document in read(path)] == ["a"]


@pytest.mark.parametrize("write", [lambda t, p: pq.write_table(t, p), lambda t, p: arrow(p, t)])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / ("c.parquet" if "write_table" in write.__code__.co_names else "c.arrow")
    write(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert "more than one column 'text'" in refusal(path)


def test_a_table_without_rows_is_no_damage(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["whole"]}), folder / "b.parquet")
    assert [document.text for document in read(folder)] == ["whole"]


def test_a_number_of_thousands_of_digits_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "n": ' + "1" * 5000 + "}")
    assert "thousands of digits" in refusal(path) and "sys." not in refusal(path)
