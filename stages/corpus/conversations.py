"""Records with roles: what is learned (a response) and what is only read before it (its context).

`corpus.kind = "chat"`: every assistant message of a conversation becomes a document of its own. Its text is the
message's content without surrounding white space, which many templates trim; its context is a JSON array of the
messages before it. Teacher and student each render that context with their own template (`stages.tokens.chat`), exactly
what they would be given to write the message themselves. A conversation's turns share its opening, by which they
are split into train and held out together.
Messages are `messages` of role and content (text, or parts of text), or `conversations` of from and value (ShareGPT).
Calls of tools stand in the context as they are, with the record's `tools`, for the template to render; an answer that
calls tools is read and not learned, since its words are the template's, and is counted.
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
LISTS = ("messages", "conversations")
"""Fields that hold a conversation."""
SPOKEN = {
    "human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""ShareGPT's names of roles that have another one here."""
TOOL_KEYS = ("tool_calls", "tool_call_id", "name")
"""What a message holds beside its words, which a template may render."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts of a content that are text."""
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


def messages_of(record: dict[str, Any], where: str, ignored: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """A chat record as messages. Raises InputError, see `turns`."""
    system = _text(record, "system", where) if "system" not in ignored else ""
    field = next((name for name in LISTS if record.get(name) is not None), None)
    if field is not None:
        _refuse_others(
            record, {field, "system", "tools", *ignored}, where, f"beside `{field}` only `system` and `tools` are read"
        )
        messages = _messages(record[field], where, field)
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
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    tools = _tools(record, where) if field is not None and "tools" not in ignored else []
    return [{**messages[0], "tools": tools}, *messages[1:]] if tools else messages


def layout(record: dict[str, Any], kind: str) -> str:
    """What a record that was read was understood as, for people."""
    field = next((name for name in LISTS if record.get(name) is not None), None)
    if field is not None and kind == "chat":
        first = next((message for message in record[field] if isinstance(message, dict)), {})
        keys = "from, value" if "from" in first else "role, content"
        tools = " with tools" if not _is_empty(record.get("tools")) else ""
        return f"`{field}` of {keys}{tools}"
    names = next(names for names in PAIRS if all(name in record for name in names))
    more = [name for name in ("system", "context", "input", "history") if not _is_empty(record.get(name))]
    return ", ".join(f"`{name}`" for name in [*names, *(more if kind == "chat" else [])])


def unlearned(record: dict[str, Any]) -> dict[str, int]:
    """Answers of a record that are read and not learned, by the reason."""
    field = next((name for name in LISTS if record.get(name) is not None), "")
    calls = sum(1 for message in record.get(field) or [] if isinstance(message, dict) and _calls(message))
    return {"calls of tools": calls} if calls else {}


def _calls(message: dict[str, Any]) -> bool:
    return not _is_empty(message.get("tool_calls"))


def roles_of(record: dict[str, Any]) -> list[str]:
    """The roles of a record's messages, each once, in order of their names."""
    messages: list[Any] = next((record[name] for name in LISTS if record.get(name) is not None), [])
    return sorted({_role(message)[:40] for message in messages if isinstance(message, dict) and _role(message)})


def _role(message: dict[str, Any]) -> str:
    """The role of a message under either name; "" where there is none."""
    if isinstance(message.get("role"), str):
        return str(message["role"])
    said = message.get("from")
    return SPOKEN.get(said, said) if isinstance(said, str) else ""


def opening(context: str, kind: str) -> str:
    """What the turns of one conversation have in common: its messages up to the first answer."""
    if kind != "chat":
        return context
    messages = json.loads(context)
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return _json(messages[:first])


def _conversation(messages: list[dict[str, Any]]) -> Iterator[Turn]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and not _calls(message)]
    for number, i in enumerate(answers, 1):
        suffix = f"/{number}" if len(answers) > 1 else ""
        yield Turn(suffix, messages[i]["content"].strip(), _json(messages[:i]))


def _json(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _messages(value: Any, where: str, field: str = "messages") -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{field}` is no list of messages; correct or remove the record")
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(message, dict) or not _role(message):
            raise InputError(f"{here}: no object with `role` and `content`; correct or remove the record")
        names = ("role", "content") if isinstance(message.get("role"), str) else ("from", "value")
        others = sorted(k for k, v in message.items() if k not in (*names, *TOOL_KEYS) and not _is_empty(v))
        if others:
            raise InputError(
                f"{here}: field {others[0]!r} would be lost, only `{names[0]}`, `{names[1]}` and calls of tools are "
                "read; remove it"
            )
        content = message.get(names[1])
        if isinstance(content, list):
            content = _joined(content, here)
        if content is None and _calls(message):
            content = ""
        if not isinstance(content, str):
            raise InputError(f"{here}: `{names[1]}` is {type(content).__name__}, expected text; correct the record")
        if _role(message) == "function_call":
            raise InputError(f"{here}: a call of a tool as text of role 'function_call'; write it as `tool_calls`")
        messages.append({"role": _role(message), "content": content, **_tool_keys(message, here)})
    return messages


def _joined(parts: list[Any], here: str) -> str:
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InputError(f"{here}: part {number} of `content` is {kind!r}, not text; remove the record")
    return "".join(part["text"] for part in parts)


def _tool_keys(message: dict[str, Any], here: str) -> dict[str, Any]:
    """`tool_calls` with arguments as objects, as templates want them, `tool_call_id`, `name`; without what is empty."""
    calling = {key: _without_nulls(message[key]) for key in TOOL_KEYS if not _is_empty(message.get(key))}
    calls = calling.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{here}: `tool_calls` is no list of objects; correct the record")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{here}: a tool call without the `name` of its function; correct the record")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed(function["arguments"], f"{here}: `arguments` of {function['name']!r}")
    return calling


def _tools(record: dict[str, Any], where: str) -> list[Any]:
    """The functions that a conversation may call: a list, or one as JSON."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: `tools`") if tools.strip() else []
    if _is_empty(tools):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: `tools` is no list of objects; correct the record")
    return [_without_nulls(tool) for tool in tools]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{what} is text that is no JSON ({error}); correct the record") from None


def _without_nulls(value: Any) -> Any:
    """The same without keys of objects that hold nothing: Parquet gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _pair_of(record: dict[str, Any], kind: str, where: str) -> tuple[str, str]:
    """The names of the prompt and the response."""
    for names in PAIRS:
        if all(name in record for name in names):
            return names
    known = ", ".join(f"{a} and {b}" for a, b in PAIRS)
    also = "`messages`, `conversations`, or " if kind == "chat" else ""
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


def _history(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Earlier turns: pairs of what the user said and what was answered, or messages."""
    value = record.get("history")
    if _is_empty(value):
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return _messages(value, f"{where}, `history`")
    messages: list[dict[str, Any]] = []
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
