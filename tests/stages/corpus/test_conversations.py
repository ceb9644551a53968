"""Records of conversations: every field is part of a document, or refused by name; nobody's answer is made up."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.conversations import PAIRS
from bytecache.stages.corpus.reader import CorpusReader, Document

Record = dict[str, Any]


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def assistant(content: str) -> Record:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Answer only in Latin."}
USED: list[tuple[Record, list[Record]]] = [
    (
        {"instruction": "Translate the sentence.", "input": "The kettle boils.", "output": "La bouilloire bout."},
        [user("Translate the sentence.\n\nThe kettle boils.")],
    ),
    (
        {"context": "The mill burned down in 1811.", "question": "When did it burn down?", "answer": "In 1811."},
        [user("The mill burned down in 1811.\n\nWhen did it burn down?")],
    ),
    ({"system": SYSTEM["content"], "prompt": "Name the sea.", "response": "Mare."}, [SYSTEM, user("Name the sea.")]),
    (
        {"prompt": "And the sky?", "response": "Caelum.", "history": [["Name the sea.", "Mare."]]},
        [user("Name the sea."), assistant("Mare."), user("And the sky?")],
    ),
    (
        {"prompt": "And the sky?", "response": "Caelum.", "history": [user("Name the sea."), assistant("Mare.")]},
        [user("Name the sea."), assistant("Mare."), user("And the sky?")],
    ),
    ({"system": SYSTEM["content"], "messages": [user("Sea?"), assistant("Mare.")]}, [SYSTEM, user("Sea?")]),
    (
        {
            "system": SYSTEM["content"],
            "conversations": [{"from": "human", "value": "Sea?"}, {"from": "gpt", "value": "Mare."}],
        },
        [SYSTEM, user("Sea?")],
    ),
    ({"conversations": [user("Sea?"), assistant("Mare.")]}, [user("Sea?")]),
    (
        {"prompt": "a", "response": "b", "input": "", "system": None, "history": [], "tools": [], "meta": {}},
        [user("a")],
    ),
]
LOST: list[tuple[str, Record, str]] = [
    ("chat", {"prompt": "Weather?", "response": "?", "tools": [{"type": "function"}]}, "tools"),
    ("chat", {"conversations": [user("a"), assistant("b")], "chosen": "c"}, "chosen"),
    ("chat", {"messages": [user("a"), assistant("b")], "input": "c"}, "input"),
    ("chat", {"prompt": "a", "response": "b", "category": "closed"}, "category"),
    ("chat", {"prompt": "a", "response": "b", "reference": ["c"], "score": 0.5}, "reference"),
    ("chat", {"prompt": "a", "response": "b", "question": "c", "answer": "d"}, "answer"),
    ("completion", {"instruction": "a", "input": "b", "output": "c"}, "input"),
    ("completion", {"context": "a", "question": "b", "answer": "c"}, "context"),
    ("completion", {"prompt": "a", "response": "b", "system": "c"}, "system"),
]


def write(path: Path, records: list[Record]) -> Path:
    if path.suffix == ".parquet":
        names = sorted({name for record in records for name in record})
        pq.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def reader(path: Path, **keys: Any) -> CorpusReader:
    return CorpusReader(Corpus.model_validate({"source": str(path), "kind": "chat", "max_bytes": 0, **keys}))


def last(documents: list[Document]) -> tuple[list[Record], str]:
    return json.loads(documents[-1].context), documents[-1].text


@pytest.mark.parametrize("number", range(len(USED)))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_belongs_to_a_prompt_is_in_it(tmp_path: Path, suffix: str, number: int) -> None:
    record, messages = USED[number]
    if suffix == "parquet" and "meta" in record:
        record = {name: value for name, value in record.items() if value != {}}  # Parquet has no empty struct
    answer = record.get("output") or record.get("answer") or record.get("response") or "Mare."
    assert last(list(reader(write(tmp_path / f"c.{suffix}", [record])))) == (messages, answer)


@pytest.mark.parametrize(("kind", "record", "field"), LOST, ids=str)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_has_no_place_is_refused_by_name(
    tmp_path: Path, suffix: str, kind: str, record: Record, field: str
) -> None:
    path = write(tmp_path / f"c.{suffix}", [record])
    with pytest.raises(InputError, match=rf"field '{field}' would be lost.*corpus\.ignore_fields"):
        list(reader(path, kind=kind))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_fields_that_are_named_are_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": "a", "response": "b", "id": f"n{i}", "category": "x", "score": i} for i in range(3)]
    some = reader(write(tmp_path / f"c.{suffix}", records), ignore_fields="score category absent")
    assert [document.doc_id for document in some] == ["n0", "n1", "n2"]
    assert some.tally.unread == {"category": 3, "score": 3}
    some = reader(write(tmp_path / f"d.{suffix}", [{"prompt": "a", "response": "b", "score": 0.5, "turn": True}]))
    assert len(list(some)) == 1 and some.tally.unread == {"score": 1, "turn": 1}


def test_every_field_of_any_record_is_used_or_named(tmp_path: Path) -> None:
    """Whatever a record holds beside its answer: its text is in the context, or its name in the refusal."""
    for names in PAIRS:
        for field in ("system", "input", "context", "history", "tools", "functions", "text", "output_2", "Input"):
            if field in names:
                continue
            value: Any = [["mark one", "mark two"]] if field == "history" else "mark one"
            record = {names[0]: "what", names[1]: "that", field: value}
            path = write(tmp_path / "c.jsonl", [record])
            for kind in ("chat", "completion"):
                said = ""
                try:
                    said = list(reader(path, kind=kind))[-1].context
                except InputError as error:
                    said = str(error).partition("would be lost")[0].replace(f"field '{field}'", "mark one")
                assert "mark one" in said, (record, kind)


def test_records_without_an_answer_are_counted_by_their_roles(tmp_path: Path) -> None:
    unanswered = {"messages": [{"role": "human", "content": "2+3?"}, {"role": "gpt", "content": "5"}]}
    path = write(tmp_path / "c.jsonl", [unanswered, unanswered, {"messages": [user("a")]}])
    with pytest.raises(
        InputError, match=r"no message of role assistant in 3 records.*roles found: gpt, human \(2\), user"
    ):
        list(reader(path))
    narrated = {"messages": [{"role": "narrator", "content": "Night."}, user("a"), assistant("b"), assistant("c")]}
    some = reader(write(tmp_path / "c.jsonl", [unanswered, narrated, {"prompt": "a", "response": "b"}]))
    assert len(list(some)) == 3
    assert some.tally.unanswered == {"gpt, human": 1} and some.tally.strange == {"narrator": 1}


def test_fields_of_plain_text_are_counted(tmp_path: Path) -> None:
    records = [{"text": "a", "url": "u", "id": "1"}, {"text": "b", "meta": {}, "url": None}]
    for suffix in ("jsonl", "parquet"):
        if suffix == "parquet":
            records = [{**record, "meta": "x", "id": record.get("id", "2")} for record in records]
        some = reader(write(tmp_path / f"c.{suffix}", records), kind="text")
        assert len(list(some)) == 2
        assert some.tally.unread == ({"url": 2, "meta": 1} if suffix == "jsonl" else {"url": 2, "meta": 2})


@pytest.mark.parametrize(("record", "words"), [
    ({"prompt": "a", "response": "b", "history": [["only one"]]}, "history"),
    ({"prompt": "a", "response": "b", "history": "text"}, "history"),
    ({"prompt": "a", "response": "b", "system": 7}, "'system' is int"),
    ({"system": "x", "messages": [SYSTEM, user("a"), assistant("b")]}, "keep one of them"),
])  # fmt: skip
def test_fields_of_another_shape_are_refused(tmp_path: Path, record: Record, words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(reader(write(tmp_path / "c.jsonl", [record])))


def test_a_flood_of_names_is_counted_in_bounded_memory(tmp_path: Path) -> None:
    records = [{"text": "a", f"field {i}" + "x" * 1000: 1} for i in range(300)]
    some = reader(write(tmp_path / "c.jsonl", records), kind="text")
    assert len(list(some)) == 300
    assert sum(some.tally.unread.values()) == 300 and len(some.tally.unread) <= 51
    assert max(map(len, some.tally.unread)) <= 80


CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_calls_of_tools_are_read_and_not_learned(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "12 degrees", "tool_call_id": "c1", "name": "weather"}
    record = {"id": "w", "messages": [user("Weather?"), called, answered, assistant("Twelve.")], "tools": TOOLS}
    for tools in (TOOLS, json.dumps(TOOLS)):
        some = reader(write(tmp_path / "c.jsonl", [{**record, "tools": tools}]))
        (document,) = some
        assert (document.doc_id, document.text) == ("w", "Twelve.")
        context = json.loads(document.context)
        assert context[0] == {**user("Weather?"), "tools": TOOLS}
        assert context[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Ulm"}}
        assert context[1]["content"] == "" and context[2] == answered
        assert some.tally.unlearned == {"calls of tools": 1}
        assert some.tally.layouts == {"`messages` of role, content with tools": 1}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "without the `name` of its function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "'f' is text that is no JSON",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part 0 of `content` is 'image_url'"),
        ({"role": "user", "content": None}, "`content` is NoneType"),
        ({"from": "function_call", "value": "{}"}, "write it as `tool_calls`"),
        ({"from": "human", "value": "a", "weight": "x"}, "field 'weight' would be lost"),
        ({"value": "a"}, "no object with `role`"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(tmp_path: Path, message: Record, why: str) -> None:
    with pytest.raises(InputError, match=why):
        list(reader(write(tmp_path / "c.jsonl", [{"messages": [message, assistant("b")]}])))


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "input_text", "text": "the sea."}]
    record = {"messages": [{"role": "user", "content": parts}, assistant("Mare.")]}
    assert last(list(reader(write(tmp_path / "c.jsonl", [record])))) == ([user("Name the sea.")], "Mare.")


def test_what_was_understood_is_counted(tmp_path: Path) -> None:
    records = [
        {"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "input": "", "output": "c"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]  # fmt: skip
    some = reader(write(tmp_path / "c.jsonl", records))
    list(some)
    assert some.tally.layouts == {
        "`instruction`, `output`, `input`": 1, "`instruction`, `output`": 1, "`conversations` of from, value": 1,
    }  # fmt: skip
