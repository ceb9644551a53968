"""`pipeline.toml` and `--set section.key=value` to one frozen `Settings` (`config_text` is the way back).

Order: defaults, then the configuration that the run folder was used with last, then the file, then the command line.
Values are typed as TOML types them and validated strictly (`"8"` is not 8), so that the same file always means the
same run. Every refusal is one line that names the key, the value, the limit and where it came from; an unknown key also
names its nearest neighbour.
"""

import difflib
import io
import math
import os
import select
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bytecache.pipeline.config_text import (
    describe_limits,
    says_default,
    secret_keys,
    secret_variable,
    sections,
    toml_value,
    type_name,
)
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.messages import url_secrets
from bytecache.schemas.secrets import Secret
from bytecache.schemas.settings import Settings, is_transfer
from bytecache.schemas.strict_json import LARGEST

DEFAULT_FILE = "pipeline.toml"
RESOLVED_FILE = "config.toml"
MAX_FILE = 1 << 20
"""Bytes of a configuration, at most."""
PIPE_S = 30
"""Seconds to wait for a configuration that comes through a pipe."""
MAX_DOTS = 100
"""Dots in a line of one."""


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Resolve the configuration.

    `path`: a TOML file; None = `pipeline.toml` of the working directory where there is one, else defaults.
    `overrides`: `section.key=value` strings; the last one for a key wins. Secrets that they do not name are those of
    the environment, where it has them.
    Raises ConfigError (unreadable file, unknown key, wrong type, value outside its limit).
    """
    return _resolve([*_file_layers(path), _environment_layer(), _override_layer(overrides)])


PERMISSIONS = (
    ("teacher", "trust_remote_code"), ("dataset", "private_redirects"), ("convert", "allow_quarantined"),
    ("convert", "delete_dump"),
)  # fmt: skip
"""What a user allows once: no run folder, which may be a stranger's, allows it again."""


def load_run_settings(
    path: Path | None, overrides: Sequence[str], saved: Callable[[Settings], tuple[str, bytes] | None]
) -> tuple[Settings, list[str]]:
    """As `load_settings`, but on top of the configuration that lies in the run folder, if any.

    A `pipeline.toml` that nobody named is on top of it with those values alone that are not the default's: one that
    was written whole says nothing about this run.

    Args:
        saved: name and content of the file in the run folder of these settings, where there is one.

    Returns:
        The settings, and `section.key = value` of every key that is as it is because of the run folder.
    """
    files, commands = _file_layers(path), _override_layer(overrides)
    environment = _environment_layer()
    plain = _resolve([*files, environment, commands])
    saved_file = saved(plain)
    if saved_file is None:
        return plain, []
    base = _saved_layer(*saved_file)
    for place in [("run", "dir"), *PERMISSIONS]:
        base.pop(place, None)
    if path is None:
        files = [_beyond_defaults(layer) for layer in files]
    here = {("run", "dir"): (plain.run.dir, "of this run")}
    layers = [*files, environment, commands, here]
    settings = _resolve([base, *layers])
    if is_transfer(settings.student) != is_transfer(_resolve([base]).student):
        # What the run's former student had by default says nothing of another kind of student.
        settings = _resolve([_beyond_defaults(base, ("train",)), *layers])
    differing = [
        f"{section}.{key} = {toml_value(value)}"
        for section in sections()
        for key, value in getattr(settings, section)
        if value != getattr(getattr(plain, section), key)
    ]
    return settings, differing


Layer = dict[tuple[str, str], tuple[Any, str]]
"""(section, key) to value and where it came from, for messages."""


def _beyond_defaults(layer: Layer, only: Sequence[str] = ()) -> Layer:
    """What a layer says that its student would not have by default; `only`: of these sections, and all of others."""
    defaults = Settings.defaults_beside(_resolve([layer]).student)
    return {
        place: told
        for place, told in layer.items()
        if (only and place[0] not in only)
        or told[0] != getattr(getattr(_silent(place[0], defaults), place[0]), place[1])
    }


def _silent(section: str, defaults: Settings) -> Settings:
    """The configuration whose `section` stands where nothing is said: the student's own, but for the student."""
    return Settings() if section == "student" else defaults


def _file_layers(path: Path | None) -> list[Layer]:
    source = path if path is not None else Path(DEFAULT_FILE)
    return [_table_layer(_read_toml(source), str(source))] if path is not None or source.is_file() else []


def _table_layer(tables: dict[str, Any], source: str) -> Layer:
    layer: Layer = {}
    for section, table in tables.items():
        _check_section(section, f"in {source}")
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: {section} = {table!r}: expected a table; write [{section}] and keys below it")
        for key, value in table.items():
            _check_key(section, key, f"in {source}")
            layer[section, key] = (value, f"in {source}")
    return layer


def _saved_layer(source: str, raw: bytes) -> Layer:
    """What a run folder was used with. Raises ConfigError for what cannot be one of ours, or is of other software."""
    try:
        return _table_layer(_parse_toml(raw, source), source)
    except ConfigError as error:
        raise ConfigError(
            f"{error} (it is the configuration that this run was used with last; delete it, and name the run's "
            "settings by --config and --set)"
        ) from None


def _environment_layer() -> Layer:
    """The secrets that the environment has; of a secret in a file only the public part was written."""
    named = {place: secret_variable(*place) for place in secret_keys()}
    return {
        place: (os.environ[variable], f"from ${variable}")
        for place, variable in named.items()
        if os.environ.get(variable)
    }


def _override_layer(overrides: Iterable[str]) -> Layer:
    layer: Layer = {}
    hidden = list(secret_keys())
    for text in overrides:
        section, key, value = _parse_override(text)
        said = f"{section}.{key}" if (section, key) in hidden else text
        layer[section, key] = (value, f"from --set {said}")
    return layer


def _resolve(layers: Sequence[Layer]) -> Settings:
    """Settings of layers, the last one on top."""
    merged: Layer = {place: value for layer in layers for place, value in layer.items()}
    data: dict[str, dict[str, Any]] = {}
    for (section, key), (value, _) in merged.items():
        data.setdefault(section, {})[key] = value
    origin = {place: where for place, (_, where) in merged.items()}
    try:
        settings = Settings.model_validate(data, strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None
    _refuse_numbers(settings, origin)
    _refuse_text(settings, origin)
    return settings


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """`key: old -> new` for each key whose value differs between two flat dictionaries."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)!r} -> {new.get(key)!r}"


def flattened(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots: for `changed_keys`."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with io.BufferedReader(io.FileIO(path, opener=_open_at_once)) as stream:
            if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode) and not select.select([stream], [], [], PIPE_S)[0]:
                raise ConfigError(
                    f"configuration {path} is a pipe that nothing came through in {PIPE_S} s; name a file"
                )
            os.set_blocking(stream.fileno(), True)
            raw = stream.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"configuration {path} does not exist; name an existing file, or write one: bytecache config > {path}"
        ) from None
    except OSError as error:
        raise ConfigError(f"configuration {path} cannot be read: {os.strerror(error.errno or 0)}") from None
    return _parse_toml(raw, str(path))


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _parse_toml(raw: bytes, path: str) -> dict[str, Any]:
    if len(raw) > MAX_FILE:
        raise ConfigError(f"configuration {path} is longer than {MAX_FILE} bytes; name a pipeline.toml")
    # A key of n parts, which is on one line, costs its parser memory in proportion to the square of n.
    for number, line in enumerate(raw.splitlines(), 1):
        if line.count(b".") > MAX_DOTS:
            raise ConfigError(f"configuration {path}, line {number}: more than {MAX_DOTS} dots; correct that line")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number of thousands of digits
        why = str(error).partition(";")[0]
        raise ConfigError(f"configuration {path} is not TOML: {why}; correct that line") from None


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _check_section(section: str, where: str) -> None:
    known = sections()
    if section in known:
        return
    # A key written above the first [table] is the commonest way to get here.
    holders = [name for name, kind in known.items() if section in kind.model_fields]
    hint = f"; did you mean {holders[0]}.{section}?" if holders else _nearest(section, list(known))
    raise ConfigError(f"unknown section {section} {where}; sections: {', '.join(known)}{hint}")


def _check_key(section: str, key: str, where: str) -> None:
    known = sections()
    keys = list(known[section].model_fields)
    if key in keys:
        return
    hint = _nearest(key, keys)
    holders = [name for name, kind in known.items() if key in kind.model_fields]
    if holders:
        hint = f"; did you mean {holders[0]}.{key}?"
    raise ConfigError(f"unknown key {section}.{key} {where}{hint or '; keys: ' + ', '.join(keys)}")


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set {text}: expected section.key=value, for example --set teacher.top_k=8")
    where = f"from --set {text}"
    _check_section(section, where)
    _check_key(section, key, where)
    raw = raw.strip()
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError, KeyError):  # TOMLDecodeError, or a number of thousands of digits
        value = raw
    # A shell strips quotes, so a bare word for a text key is text even where TOML would read 2048 or true.
    if not isinstance(value, str | list | dict) and isinstance(
        sections()[section].model_fields[key].default, str | Secret
    ):
        value = raw
    return section, key, value


def _explain(error: ValidationError, origin: dict[tuple[str, str], str]) -> str:
    problem = error.errors(include_url=False)[0]
    if len(problem["loc"]) < 2:
        return f"{problem['loc'] or 'the configuration'}: {problem['msg']}; write [section] and keys below it"
    section, key = (str(part) for part in problem["loc"][:2])
    field = sections()[section].model_fields[key]
    limits = describe_limits(field)
    wanted = type_name(field) + (f" {limits}" if limits else "")
    where = origin.get((section, key), "")
    return (
        f"{section}.{key} = {_show(problem['input'])} {where}: expected {wanted} (default {says_default(section, key)})"
    )


def _refuse_numbers(settings: Settings, origin: dict[tuple[str, str], str]) -> None:
    """What a field's limits cannot say: NaN, what no file of ours can state, and what lies between -1 and 0.

    -1 stands for something else.
    """
    for section, kind in sections().items():
        for key, value in getattr(settings, section):
            where = origin.get((section, key), "")
            if isinstance(value, int) and abs(value) >= LARGEST:
                raise ConfigError(f"{section}.{key} = {str(value)[:40]} {where}: expected a number below {LARGEST}")
            if not isinstance(value, float):
                continue
            if not math.isfinite(value):
                raise ConfigError(f"{section}.{key} = {value} {where}: expected a finite number")
            if kind.model_fields[key].default == -1.0 and -1.0 < value < 0.0:
                raise ConfigError(f"{section}.{key} = {value} {where}: expected a number >= 0, or -1 for the default")


def _refuse_text(settings: Settings, origin: dict[tuple[str, str], str]) -> None:
    """What no file name and no file of ours may hold: NUL, bytes that are not UTF-8, a password in an address.

    And nothing where something is needed: an empty `run.dir` would be the current folder.
    """
    for section, kind in sections().items():
        for key, value in getattr(settings, section):
            text = value.reveal() if isinstance(value, Secret) else value
            if not isinstance(text, str):
                continue
            if isinstance(value, str) and url_secrets(value):
                raise ConfigError(
                    f"{section}.{key} = {value}: a password or token in an address is written to files; leave it out, "
                    "and to the environment of the service's own tools (AWS_*, GOOGLE_*, AZURE_*, HF_TOKEN)"
                )
            where = origin.get((section, key), "")
            default = kind.model_fields[key].default
            if not text and default:
                raise ConfigError(f"{section}.{key} {where}: is empty; name one, as the default {toml_value(default)}")
            if "\0" in text:
                raise ConfigError(f"{section}.{key} {where}: holds a NUL character; give a text without it")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ConfigError(f"{section}.{key} = {value!r} {where}: is not UTF-8; rename it") from None


def _show(value: Any) -> str:
    try:
        return toml_value(value)
    except TypeError:
        return repr(value)[:80]
