"""Files that hold chat templates, looked at before a library reads them whole and mistakes what is wrong with them.

chat_template.jinja                    the template that is taken, whatever the configuration says
additional_chat_templates/NAME.jinja   others by name
tokenizer_config.json                  `chat_template`: a text, or a list of {"name": ..., "template": ...}
"""

from pathlib import Path
from typing import Any

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import read_regular

MAX_TEMPLATE = 1 << 20
"""Bytes of one template, at most; the longest that people use have some 30 kB."""
MAX_CONFIG = 1 << 25
"""Bytes of a tokenizer_config.json, at most; one with many thousands of added tokens has some MB."""
MAX_NAMED = 64
"""Templates of one tokenizer."""
CONFIG = "tokenizer_config.json"


def refuse_unusable(folder: Path, what: str) -> None:
    """Raises InputError where a template of the folder is too long, no text, or not in a form that is read.

    `what`: names the tokenizer in messages.
    """
    extra = folder / "additional_chat_templates"
    files = [folder / "chat_template.jinja", *(sorted(extra.glob("*.jinja")) if extra.is_dir() else [])]
    if len(files) > MAX_NAMED:
        raise InputError(f"{what}: {len(files)} chat templates, at most {MAX_NAMED} are read; remove some")
    for file in files:
        if file.exists():
            _refuse_file(file, what)
    _refuse_declared(folder / CONFIG, what)


def _refuse_file(file: Path, what: str) -> None:
    raw = _read(file, what, MAX_TEMPLATE, "a chat template")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what}: its chat template {file.name} is not UTF-8 (byte {raw[error.start]:#04x} at {error.start}); save "
            "it as UTF-8, or fetch it again"
        ) from None


def _refuse_declared(file: Path, what: str) -> None:
    """The same of what tokenizer_config.json holds; what else may be wrong with that file its reader says."""
    if not file.exists():
        return
    try:
        config = strict_json.loads(_read(file, what, MAX_CONFIG, "such a file"))
    except ValueError:
        return
    declared = config.get("chat_template") if isinstance(config, dict) else None
    if declared is None:
        return
    names = set()
    for name, template in _named(declared, what):
        if name in names:
            raise InputError(f"{what}: {CONFIG} has two chat templates called {name[:40]!r}; keep one of them")
        names.add(name)
        if len(template) > MAX_TEMPLATE:
            raise InputError(
                f"{what}: the chat template in {CONFIG} has {len(template)} characters, at most {MAX_TEMPLATE} are "
                "read; fetch it again or choose another model"
            )


def _named(declared: Any, what: str) -> list[tuple[str, str]]:
    """(name, template) of what a configuration declares. Raises InputError where it is neither text nor a list."""
    if isinstance(declared, str):
        return [("default", declared)]
    templates = []
    for each in declared if isinstance(declared, list) and len(declared) <= MAX_NAMED else [None]:
        name, template = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise InputError(
                f"{what}: chat_template in {CONFIG} must be a text, or a list of at most {MAX_NAMED} objects with a "
                "name and a template, both texts; correct it or fetch it again"
            )
        templates.append((name, template))
    return templates


def _read(file: Path, what: str, limit: int, kind: str) -> bytes:
    try:
        raw = read_regular(file, limit)
    except OSError as error:
        raise InputError(f"{what}: {file.name} cannot be read ({error.strerror}); fetch it again") from error
    if len(raw) > limit:
        raise InputError(
            f"{what}: {file.name} has {file.stat().st_size} bytes, {kind} at most {limit}; fetch it again or choose "
            "another model"
        )
    return raw
