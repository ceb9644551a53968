"""Records with roles: what is learned (a response) and what is only read before it (its context).

`corpus.kind = "chat"`: every assistant message of a conversation becomes a document of its own. Its text is the
message's content without surrounding white space, which many templates trim; its context is a JSON array of the
messages before it. Teacher and student each render that context with their own template (`stages.tokens.chat`), exactly
what they would be given to write the message themselves. A conversation's turns share its opening, by which they
are split into train and held out together.
Of a record with a prompt and a response, `system`, `context`, `input` and `history` are part of what is read before the
response, as Alpaca, Dolly and SQuAD mean them.
`corpus.kind = "completion"`: text is the response, context the prompt, both as they are; nothing is rendered.
Every field of a record is used, or named in a refusal, or in `corpus.ignore_fields`; numbers, which nobody says, are
counted and said.
Price: a context is repeated for every turn of its conversation.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from bytecache.schemas.errors import InputError

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Names under which prompts and responses are found, in this order."""
KIND_KEY = b"bytecache-kind"
"""Key of the schema metadata of a slice of the corpus; the value is its `corpus.kind`."""
ID_FIELDS = ("id", "doc_id")
"""Fields that name a record."""
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Roles that chat templates know of."""


class Turn(NamedTuple):
    """A response and what comes before it; `suffix` tells the turns of one conversation apart."""

    suffix: str
    text: str
    context: str


def turns(record: dict[str, Any], kind: str, where: str, ignored: frozenset[str] = frozenset()) -> Iterator[Turn]:
    """The documents of one record; none where nobody answers (see `roles_of`).

    Args:
        record: with `messages`, or a pair of `PAIRS` and what belongs to a prompt. kind: "chat" or "completion".
        where: for messages. ignored: fields that need not be used.

    Raises:
        InputError: naming place, field and remedy, for a record without them, with others than text, or with a field
            that would be lost.
    """
    if kind == "completion":
        names = _pair_of(record, kind, where)
        _refuse_others(record, {*names, *ignored}, where, "completion reads a prompt and a response as they are")
        prompt, response = _texts(record, names, where)
        yield Turn("", response, prompt)
        return
    yield from _conversation(messages_of(record, where, ignored))


def messages_of(record: dict[str, Any], where: str, ignored: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """A chat record as messages. Raises InputError, see `turns`."""
    system = _text(record, "system", where) if "system" not in ignored else ""
    if record.get("messages") is not None:
        _refuse_others(record, {"messages", "system", *ignored}, where, "beside `messages` only `system` is read")
        messages = _messages(record["messages"], where)
        if system and messages[0]["role"] == "system":
            raise InputError(f"{where}: `system` beside a first message of role system; keep one of them")
    else:
        names = _pair_of(record, "chat", where)
        _refuse_others(
            record, {*names, "system", "context", "input", "history", *ignored}, where, "it has no place in a prompt"
        )
        prompt, response = _texts(record, names, where)
        before = [_text(record, "context", where), prompt, _text(record, "input", where)]
        messages = _history(record, where) if "history" not in ignored else []
        messages.append({"role": "user", "content": "\n\n".join(part for part in before if part)})
        messages.append({"role": "assistant", "content": response})
    return [{"role": "system", "content": system}, *messages] if system else messages


def roles_of(record: dict[str, Any]) -> list[str]:
    """The roles of a record's messages, each once, in order of their names."""
    messages = record.get("messages") or []
    return sorted(
        {str(message["role"])[:40] for message in messages if isinstance(message, dict) and "role" in message}
    )


def opening(context: str, kind: str) -> str:
    """What the turns of one conversation have in common: its messages up to the first answer."""
    if kind != "chat":
        return context
    messages = json.loads(context)
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return _json(messages[:first])


def _conversation(messages: list[dict[str, str]]) -> Iterator[Turn]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers, 1):
        suffix = f"/{number}" if len(answers) > 1 else ""
        yield Turn(suffix, messages[i]["content"].strip(), _json(messages[:i]))


def _json(messages: list[dict[str, str]]) -> str:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` is no list of messages; correct or remove the record")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{here}: no object with `role` and `content`; correct or remove the record")
        others = sorted(k for k, v in message.items() if k not in ("role", "content") and not _is_empty(v))
        if others:
            raise InputError(
                f"{here}: field {others[0]!r} would be lost, only `role` and `content` are read; remove it"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = _joined(content, here)
        if not isinstance(content, str):
            raise InputError(f"{here}: `content` is {type(content).__name__}, expected text; correct the record")
        messages.append({"role": message["role"], "content": content})
    return messages


def _joined(parts: list[Any], here: str) -> str:
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise InputError(f"{here}: `content` has parts that are not text; remove the record")
    return "".join(part["text"] for part in parts)


def _pair_of(record: dict[str, Any], kind: str, where: str) -> tuple[str, str]:
    """The names of the prompt and the response."""
    for names in PAIRS:
        if all(name in record for name in names):
            return names
    known = ", ".join(f"{a} and {b}" for a, b in PAIRS)
    also = "`messages`, or " if kind == "chat" else ""
    present = ", ".join(list(record)[:8]) or "nothing"
    raise InputError(
        f"{where}: corpus.kind = {kind!r} needs {also}one of the pairs {known} (present: {present}); "
        "rename the fields, or set corpus.kind"
    )


def _texts(record: dict[str, Any], names: tuple[str, str], where: str) -> tuple[str, str]:
    values = [record[name] for name in names]
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: fields {names[0]!r} and {names[1]!r} must be text; correct the record")
    return values[0], values[1]


def _text(record: dict[str, Any], name: str, where: str) -> str:
    """An optional field of text."""
    value = record.get(name)
    if _is_empty(value):
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} is {type(value).__name__}, expected text; correct the record")
    return value


def _history(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Earlier turns: pairs of what the user said and what was answered, or messages."""
    value = record.get("history")
    if _is_empty(value):
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return _messages(value, f"{where}, `history`")
    messages: list[dict[str, str]] = []
    for turn in value if isinstance(value, list) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise InputError(f"{where}: `history` is no list of [user, assistant] pairs of text; correct the record")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _refuse_others(record: dict[str, Any], used: set[str], where: str, why: str) -> None:
    """Refuse a field that holds something and is not used."""
    others = sorted(name for name in unused(record) if name not in used and not isinstance(record[name], int | float))
    if others:
        raise InputError(
            f"{where}: field {others[0]!r} would be lost, {why}; if it is not part of the conversation, name it in "
            f"corpus.ignore_fields (fields not used here: {' '.join(others[:8])})"
        )


def unused(record: dict[str, Any]) -> Iterator[str]:
    """Fields that hold something and do not name the record. Numbers among them are said and not refused."""
    return (name for name, value in record.items() if name not in ID_FIELDS and not _is_empty(value))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)
