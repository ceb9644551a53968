"""One frozen `Settings` as text: a commented `pipeline.toml`, and what strangers are told of a data set's making.

Keys that may hold a secret (`schemas.secrets`) are written without it. The environment, $BYTECACHE_SECTION_KEY, comes
before the file there: so the jobs that run elsewhere get theirs, and no file has it.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from bytecache.schemas.messages import public_url
from bytecache.schemas.secrets import Secret
from bytecache.schemas.settings import TRANSFER, TRANSFER_STUDENT, Section, Settings, Teacher, Train

_TITLES = {
    "run": "Where a run lives",
    "corpus": "The text (stage: plan)",
    "teacher": "The large model and its engine (stage: teacher)",
    "convert": "Token dump to byte targets (stage: convert)",
    "dataset": "The byte targets: what is said of them, and where students read them",
    "student": "The small model (stage: train)",
    "train": "Training (stage: train)",
    "fleet": "Many workers on one plan, and preemption (--worker)",
}
_LIMIT_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_TOML_ESCAPES = {chr(code): f"\\u{code:04x}" for code in (*range(32), 127)} | {'"': '\\"', "\\": "\\\\"}


def sections() -> dict[str, type[Section]]:
    """Tables of `pipeline.toml` by name, in file order."""
    tables: dict[str, type[Section]] = {}
    for name, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        tables[name] = field.annotation
    return tables


def secret_keys() -> Iterator[tuple[str, str]]:
    """(section, key) of every key whose value may hold a secret."""
    for section, kind in sections().items():
        yield from ((section, key) for key, field in kind.model_fields.items() if isinstance(field.default, Secret))


def secret_variable(section: str, key: str) -> str:
    """The environment variable that a secret key is taken from."""
    return f"BYTECACHE_{section}_{key}".upper()


def secrets_of(settings: Settings) -> dict[str, str]:
    """Variables and values of the settings that hold a secret: for the environment of processes, never for a file."""
    values = {(section, key): getattr(getattr(settings, section), key) for section, key in secret_keys()}
    return {secret_variable(*place): value.reveal() for place, value in values.items() if value.is_secret}


PUBLISHED = {
    "corpus": None,
    "teacher": set(Teacher.model_fields) - {"server", "server_requests"},
    "convert": None,
    "dataset": {"name", "license", "teacher_license"},
}
"""What is said beside a data set of how it was made: sections, and of some only these keys (None: all)."""


def render_published(settings: Settings) -> str:
    """The settings that decided a data set, as TOML for strangers: no path but its last part, no machine's own."""
    lines = ["# bytecache: the settings that this data set was made with; a path is its last part alone."]
    for name, keys in PUBLISHED.items():
        lines += ["", f"[{name}]"]
        for key, value in getattr(settings, name):
            if keys is None or key in keys:
                lines.append(f"{key} = {toml_value(_last_part(value) if isinstance(value, str) else value)}")
    return "\n".join(lines) + "\n"


def _last_part(text: str) -> str:
    """A path's last part, a URL's host and path; any other text as it is."""
    if "://" in text:
        return public_url(text)
    path = text.startswith(("/", "~", "./", "../")) or Path(text).is_absolute() or Path(text).exists()
    return Path(text).name if path else text


def default_of(section: str, key: str) -> Any:
    """What a key is in a configuration that names none."""
    return getattr(getattr(Settings(), section), key)


def says_default(section: str, key: str) -> str:
    """A key's default for a person; of some keys of `[train]` two, by the student."""
    default = toml_value(default_of(section, key))
    if section != "train" or key not in TRANSFER:
        return default
    return f"{default} for a model under another tokenizer, else {toml_value(Train.model_fields[key].default)}"


def render_template(settings: Settings, *, whole: bool = False) -> str:
    """`settings` as a complete `pipeline.toml`: every key, with its documentation, limits and default above it.

    Keys whose default depends on the student, and the default student itself, are written as comments, so that another
    student gets its own tokenizer and training; `whole`: they are written as any other.
    """
    lines = [
        "# bytecache: every key, its unit, its limits and its default. Any of them can be overridden on the",
        "# command line: bytecache run --set teacher.top_k=8 --set run.dir=runs/small",
    ]
    implied = set() if whole else _implied(settings)
    for name, kind in sections().items():
        lines += ["", f"# {_TITLES.get(name, name)}", f"[{name}]"]
        table = getattr(settings, name)
        for key, field in kind.model_fields.items():
            limits = describe_limits(field)
            note = f"{field.description or ''} Default: {says_default(name, key)}{'; ' + limits if limits else ''}."
            lines += textwrap.wrap(note, 116, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
            value = getattr(table, key)
            if isinstance(value, Secret) and value.is_secret:
                lines.append(f"# The value given holds a secret, which is not written: ${secret_variable(name, key)}.")
            lines.append(f"{'# ' if (name, key) in implied else ''}{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def _implied(settings: Settings) -> set[tuple[str, str]]:
    """Keys that are as the student has them by default, and the student that a configuration has which names none."""
    beside = Settings.defaults_beside(settings.student).train
    keys = {("train", key) for key in TRANSFER if getattr(settings.train, key) == getattr(beside, key)}
    if settings.student.model_dump(include=set(TRANSFER_STUDENT)) == TRANSFER_STUDENT:
        keys |= {("student", key) for key in TRANSFER_STUDENT}
    return keys


def describe_limits(field: FieldInfo) -> str:
    """The limits of one key for a person, e.g. `>= 0 and < 1` or `one of "vllm", "hf"`; empty where there are none."""
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(toml_value(choice) for choice in get_args(field.annotation))
    signs = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _LIMIT_SIGNS.items()
        if getattr(limit, name, None) is not None
    ]
    return " and ".join(signs)


def type_name(field: FieldInfo) -> str:
    """What a key expects, for a person."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if isinstance(field.default, Secret):
        return "text"
    return names.get(type(field.default), "a value") if get_origin(field.annotation) is not Literal else "text,"


def toml_value(value: Any) -> str:
    """A value as TOML has it; a secret and an address without what is private. Raises TypeError for other kinds."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Secret):
        value = value.public
    if isinstance(value, str):
        value = public_url(value)
        escaped = "".join(_TOML_ESCAPES.get(char, char) for char in value)
        return f'"{escaped}"'
    raise TypeError(f"no TOML form for {type(value).__name__}")
