"""What `plan` says: all that it left out, and what could never be trained on, before anything is paid for."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.context import Context, open_context
from bytecache.schemas.dump.parquet import open_part, part_writer
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.stages.corpus.containers import Table
from bytecache.stages.foreign.records import Cache
from tests.support.tiny_models import byte_level_tokenizer

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def lines_of(tmp_path: Path, *overrides: str, run: str = "run") -> list[str]:
    said: list[str] = []
    settings = load_settings(None, [f"run.dir={tmp_path / run}", *overrides])
    context: Context = open_context(settings, said.append)
    plan(context)
    return said


def test_files_of_other_kinds_are_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.md", "c.JSONL", "e.csv"):
        (folder / name).write_text("x")
    (folder / "b.txt").write_text("one text")
    (folder / "d.jsonl").write_text('{"text": "another"}\n')
    for _ in range(2):
        said = lines_of(tmp_path, f"corpus.source={folder}")
        assert "plan: 3 files of other kinds ignored: a.md, c.JSONL, e.csv" in said


@pytest.mark.parametrize(
    ("limit", "is_cut"), [(25, True), (30, True), (60, False), (61, False), (0, False), (59, False)]
)
def test_a_cut_at_max_bytes_is_said_and_only_a_cut(tmp_path: Path, limit: int, is_cut: bool) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i}" * 10}) + "\n" for i in range(6)) + '{"text": ""}\n')
    said = lines_of(tmp_path, f"corpus.source={source}", f"corpus.max_bytes={limit}", "corpus.unit_bytes=1000")
    assert any("of more (corpus.max_bytes" in line for line in said) == is_cut, said


def test_files_without_a_byte_are_counted_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("one text")
    for name in ("b.txt", "c.jsonl"):
        (folder / name).write_bytes(b"")
    assert "1 documents, 2 empty ones skipped" in lines_of(tmp_path, f"corpus.source={folder}")[0]
    for name, kind in (("d.jsonl.gz", "gzip"), ("d.jsonl.zst", "zstd"), ("d.parquet", "Parquet"), ("d.arrow", "Arrow")):
        (folder / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{name}: .*{kind}.*fetch the file again"):
            lines_of(tmp_path, f"corpus.source={folder}", run="other")
        (folder / name).unlink()


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_paragraphs_are_advised_where_there_are_some(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "alone"}\n')
    said = lines_of(tmp_path, f"corpus.source={tmp_path / name}")
    (line,) = (line for line in said if "nothing is held out" in line)
    assert ("paragraphs" in line) is name.endswith(".txt")


def test_what_lies_behind_the_cut_is_not_looked_at(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"text": "a" * 40}) + "\nnot JSON\n")
    said = lines_of(tmp_path, f"corpus.source={source}", "corpus.max_bytes=40")
    assert "1 documents" in said[0] and any("of more" in line for line in said)


def test_fields_and_records_that_were_passed_over_are_said(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    records = [
        {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
        {"messages": [{"role": "narrator", "content": "n"}, {"role": "assistant", "content": "b"}], "source": "x"},
        {"prompt": "a", "response": "b"},
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = lines_of(tmp_path, f"corpus.source={source}", "corpus.kind=chat", "corpus.ignore_fields=source")
    assert "plan: 1 records left out, no message of role assistant; roles found: gpt, human (1)" in said
    assert "plan: roles that a chat template may not know, by records: narrator (1)" in said
    assert "plan: fields that are not read, by records: source (1)" in said


@pytest.mark.parametrize("seed", range(12))
def test_a_corpus_of_one_document_is_kept_for_training(tmp_path: Path, seed: int) -> None:
    """Whatever its hash says: with nothing to train on, a teacher would have been paid for in vain."""
    source = tmp_path / "one.txt"
    source.write_text("A book of one file. " * 40)
    said = lines_of(
        tmp_path, f"corpus.source={source}", f"run.seed={seed}", "corpus.heldout_fraction=0.9", run=f"r{seed}"
    )
    assert "(0 held out)" in said[0]
    assert any("nothing is held out" in line and "paragraphs" in line for line in said)


def test_a_book_that_is_held_out_beside_pamphlets_is_said(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"pamphlet {number}")
    (tmp_path / "book.txt").write_text("A long book. " * 500)
    found = []
    for seed in range(12):
        overrides = [f"corpus.source={tmp_path}", f"run.seed={seed}", "corpus.heldout_fraction=0.3"]
        out = tmp_path.parent / f"{tmp_path.name}-runs"
        found.append(any("warning" in line for line in lines_of(out, *overrides, run=f"r{seed}")))
    assert any(found) and not all(found)


@pytest.fixture
def no_system(tmp_path: Path) -> Path:
    """A student whose template refuses system messages."""
    folder = tmp_path / "student"
    tokenizer = byte_level_tokenizer(320)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    bos_token_id=0, eos_token_id=1)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": NO_SYSTEM}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("with_system", [8, 3])
def test_a_student_template_that_refuses_system_messages_is_found_before_the_teacher_runs(
    tmp_path: Path, no_system: Path, with_system: int
) -> None:
    records = [
        {"messages": [*([{"role": "system", "content": "Be brief."}] if i < with_system else []),
                      {"role": "user", "content": f"What is {i} plus {i}?"},
                      {"role": "assistant", "content": f"It is {2 * i}."}]}
        for i in range(8)
    ]  # fmt: skip
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [f"corpus.source={source}", "corpus.kind=chat", f"student.model={no_system}"]
    if with_system == 8:
        with pytest.raises(InputError, match=r"none of the first 8 .*chat template refuses them.*System role.*8"):
            lines_of(tmp_path, *overrides)
    else:
        said = lines_of(tmp_path, *overrides)
        assert any("3 of the first 8 documents cannot be read by the student" in line for line in said), said


def test_a_run_folder_may_have_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow takes a path like `2026-11-30T12:00/...`, of a file that is not there yet, for an address."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"text": "a document"}\n')
    plan(open_context(load_settings(None, ["run.dir=javascript:1", "corpus.source=c.jsonl"]), lambda line: None))
    (slice_,) = Path("javascript:1/plan/slices").iterdir()
    with part_writer("javascript:2", pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [1]}))
    with pytest.raises(IntegrityError, match="not a bytecache token dump"):
        open_part(Path("javascript:2"))
    with Table(slice_).opened() as (schema, _):
        assert "text" in schema.names
    with pytest.raises(InputError, match="missing"):
        _ = Cache(slice_, "plain")[0]
