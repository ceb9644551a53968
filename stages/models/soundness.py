"""Whether the files of a checkpoint can be meant: asked before any library opens them, and before memory is taken.

A config.json is a stranger's text: a negative width, a number as text, a billion rows of an embedding. What a library
makes of it is an exception of its own, or an allocation of everything. Here each number has its type and a limit, and
the whole must fit the weights that lie beside it, whose safetensors headers say how many numbers there are.

Price: the header of each weight file, a few ms.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import kind_of, open_regular
from bytecache.schemas.whole import is_whole

MAX_CONFIG = 1 << 24
"""Bytes of a config.json, at most."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""
MAX_NAME = 1000
"""Characters of a weight's name."""
MAX_IDS = 1 << 22
"""Ids of a vocabulary; the largest that are published have 2 ** 18."""
FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")
SIZES: dict[str, int] = {
    "vocab_size": MAX_IDS,
    "hidden_size": 1 << 20, "n_embd": 1 << 20, "d_model": 1 << 20, "dim": 1 << 20,
    "intermediate_size": 1 << 24, "n_inner": 1 << 24, "ffn_dim": 1 << 24,
    "num_hidden_layers": 1 << 12, "n_layer": 1 << 12, "num_layers": 1 << 12,
    "num_attention_heads": 1 << 14, "n_head": 1 << 14, "num_key_value_heads": 1 << 14, "num_heads": 1 << 14,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 40, "n_positions": 1 << 40,
}  # fmt: skip
"""Numbers of a configuration that decide how much memory a model takes, and the most that each may be; 1 at least."""
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PACKED = 16
"""Numbers that one stored element of a quantised checkpoint may stand for, at most (and some room)."""


def refuse_unsound(folder: Path, where: str) -> None:
    """Raises InputError unless the checkpoint's files are files and its config.json can be that of its weights.

    `where` names it in messages, as `teacher.model = 'x'`. A folder without a config.json or weights is for others to
    refuse.
    """
    for pattern in FILES:
        for file in folder.glob(pattern):
            # A link to nothing is refused by whoever needs the file.
            if file.exists() and not file.is_file():
                raise InputError(f"{where}: {file.name} is {kind_of(file.stat().st_mode)}, not a regular file")
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            config = _read(folder / name, where)
            _check(config, f"{where}: {name}")
            if name == "config.json":
                _refuse_beyond_weights(folder, config, where)


def _read(file: Path, where: str) -> dict[str, Any]:
    with open_regular(file) as stream:
        raw = stream.read(MAX_CONFIG + 1)
    if len(raw) > MAX_CONFIG:
        raise InputError(f"{where}: {file.name} is longer than {MAX_CONFIG} bytes; fetch it again")
    try:
        config = strict_json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {file.name} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{where}: {file.name} holds a {type(config).__name__}, not an object; fetch it again")
    return config


def _check(config: dict[str, Any], where: str) -> None:
    """Types and limits of the numbers that are known; of a model with several parts, of each."""
    for key, wanted, fits in _rules():
        for value in _given(config, key):
            if not fits(value):
                raise InputError(f"{where}: {key} = {repr(value)[:60]}: must be {wanted}; fetch it again")
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is type(width) is int and not config.get("head_dim") and width % heads:
        raise InputError(f"{where}: hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    for key, value in config.items():
        # transformers fetches and runs compiled code of the repository that such a name is.
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value):
            raise InputError(
                f"{where}: {key} = {json.dumps(value)[:80]} names code of somebody's repository, which is not run; "
                "take it out"
            )
    for key in ("text_config", "vision_config", "audio_config"):
        if isinstance(config.get(key), dict):
            _check(config[key], f"{where}: {key}")


def _within(least: int, most: int, value: Any) -> bool:
    """Whether a value is a whole number in these limits; a truth value is none."""
    return is_whole(value, least) and value <= most


def _rules() -> Iterator[tuple[str, str, Callable[[Any], bool]]]:
    """Key, what its values must be, and whether one is."""
    for key, most in SIZES.items():
        yield key, f"a whole number in 1..{most}", partial(_within, 1, most)
    for key in _IDS:  # -1 is what some write for none
        yield key, f"an id below {MAX_IDS}", partial(_within, -1, MAX_IDS - 1)
    for key in _ACTIVATIONS:
        yield key, "a name", lambda value: isinstance(value, str)


def _given(config: dict[str, Any], key: str) -> list[Any]:
    """What a configuration says of a key: one value, or one for each layer; nothing where it is absent or null."""
    value = config.get(key)
    return [each for each in (value if isinstance(value, list) else [value]) if each is not None]


def _refuse_beyond_weights(folder: Path, config: dict[str, Any], where: str) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    stored = sum(_elements(file, where) for file in files)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    width, rows = _number(text, "hidden_size", "n_embd", "d_model"), _number(text, "vocab_size")
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    claimed = rows * width + layers * width
    if claimed > _PACKED * stored:
        raise InputError(
            f"{where}: config.json claims {rows} rows and {layers} layers of width {width}, but the weights hold "
            f"{stored} numbers in all; fetch both again"
        )


def _number(config: dict[str, Any], *names: str) -> int:
    return next((value for name in names if is_whole(value := config.get(name))), 0)


def _length(value: Any) -> int:
    """A length that a header states. Raises ValueError for what is no whole number from 0 on."""
    if not is_whole(value, 0):
        raise ValueError(f"{str(value)[:40]} is no length")
    return int(value)


def _elements(file: Path, where: str) -> int:
    """How many numbers a safetensors file holds, by its header, whose tensors must lie inside the file."""
    refusal = f"{where}: {file.name} is no safetensors file"
    try:
        with open_regular(file) as stream:
            size = file.stat().st_size
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise InputError(f"{refusal} (a header of {length} bytes in {size}); fetch it again")
            header = strict_json.loads(stream.read(length))
            if strange := [name for name in header if len(name) > MAX_NAME or not name.isprintable()]:
                raise InputError(
                    f"{where}: {file.name} names a weight {strange[0][:80]!r}, which is none: control characters, or "
                    f"more than {MAX_NAME} characters; do not use it"
                )
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((_length(entry["data_offsets"][1]) for entry in tensors), default=0)
            elements = sum(math.prod(map(_length, entry["shape"])) for entry in tensors)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{refusal} ({type(error).__name__} in its header); fetch it again") from error
    if 8 + length + end > size:
        raise InputError(
            f"{where}: {file.name} has {size} bytes, its header asks for {8 + length + end}; fetch it again"
        )
    return min(elements, 8 * size)
