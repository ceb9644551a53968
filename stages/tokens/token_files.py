"""Finds a model's tokenizer and configuration files and reads them, whatever their kind.

In order of preference: `tokenizer.json`, Tekken (`tekken*.json`), tiktoken rank files (`*.tiktoken`), RWKV vocabularies
(`rwkv_vocab*.txt`), SentencePiece models (`*.model`), then what transformers makes of `vocab.json` and `merges.txt`.
Each is read as it stands and cut by the library it was made for, never through AutoTokenizer: some of its classes
rebuild a `tokenizer.json` from their own defaults, and from Mistral's SentencePiece model it makes one that cuts
every text we tried into other tokens.
"""

import ast
import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.schemas.whole import is_whole, same
from bytecache.stages.tokens.byte_trie import build_trie, sort_tokens
from bytecache.stages.tokens.encoders import Encoder, GreedyEncoder, HfEncoder, RankEncoder, SentencePieceEncoder
from bytecache.stages.tokens.guard import UnopenedError, is_panic
from bytecache.stages.tokens.library import opened
from bytecache.stages.tokens.rank_files import RANK_FILES
from bytecache.stages.tokens.template_files import refuse_unusable
from bytecache.stages.tokens.token_bytes import (
    Json,
    TokenTable,
    refuse_twins,
    room_for,
    table_from_json,
    table_from_sentencepiece,
)

_FILES = ["*.json", "*.model", "*.tiktoken", "rwkv_vocab*.txt", "*.jinja"]
MAX_FILE = 1 << 28
"""Bytes of a tokenizer's file, at most; the largest that are published have 2 ** 25."""
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files describe it, and what the model beside it says about start, end and size."""

    where: str
    table: TokenTable
    make_encoder: Callable[[list[bytes | None]], Encoder]
    """Builds the encoder once the final table (None = unreachable from text) is known."""
    bos: int | None = None
    """The tokenizer's own start token."""
    eos: int | None = None
    config: Json = field(default_factory=dict)
    """config.json, with the text model's settings on top where the model has several."""
    generation: Json = field(default_factory=dict)
    """generation_config.json."""


def open_tokenizer(model: str | Path, *, revision: str = "", trust_remote_code: bool = False) -> TokenizerFiles:
    """Read the tokenizer of a folder, a tokenizer file or a hub id; InputError where there is none that is exact."""
    path = _resolve(model, revision)
    folder, only = (path, None) if path.is_dir() else (path.parent, path)
    where = str(model)
    refuse_unusable(folder, f"the tokenizer of {where}")
    generation = _read_json(folder / "generation_config.json")
    try:
        config = _text_settings(_read_json(folder / "config.json"))
        for key in ("bos_token_id", "eos_token_id"):
            as_ids(config.get(key)), as_ids(generation.get(key))
        if type(config.get("vocab_size") or 0) is not int:
            raise ValueError(f"vocab_size is {config['vocab_size']!r}")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: config.json or generation_config.json holds no token ids ({error}); fetch them again"
        ) from error
    tokenizer_config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    files = [only] if only else sorted(file for file in folder.iterdir() if file.is_file())
    for pattern, reader in (
        ("tokenizer.json", _read_hf),
        ("tekken*.json", _read_tekken),
        ("*.tiktoken", _read_ranks),
        ("rwkv_vocab*.txt", _read_rwkv),
        ("tokenizer.model", _read_model),
        ("*.model", _read_model),
        ("*.model.v*", _read_model),
    ):
        for file in files:
            if file.match(pattern):
                _refuse_endless(file)
                return _with_config(reader(file, where, tokenizer_config), config, generation)
    backend = _convert_slow(folder, where, trust_remote_code)
    return _with_config(_from_backend(backend, where, tokenizer_config), config, generation)


def _refuse_endless(file: Path) -> None:
    if (size := file.stat().st_size) > MAX_FILE:
        raise InputError(f"{file} has {size} bytes, a tokenizer's files at most {MAX_FILE}; fetch it again")


def _text_settings(config: Json) -> Json:
    """A configuration whose text model is nested, flattened: its own size, everyone's end tokens."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    flat = nested | {key: value for key, value in config.items() if value is not None}
    ends = [*as_ids(config.get("eos_token_id")), *as_ids(nested.get("eos_token_id"))]
    return flat | {"eos_token_id": ends, "vocab_size": nested.get("vocab_size") or config.get("vocab_size")}


def as_ids(value: Any) -> list[int]:
    """An id, a list of ids or nothing, as configurations have it."""
    every = value if isinstance(value, list) else [value]
    return [int(i) for i in every if i is not None and not isinstance(i, bool)]


def _with_config(files: TokenizerFiles, config: Json, generation: Json) -> TokenizerFiles:
    return TokenizerFiles(files.where, files.table, files.make_encoder, files.bos, files.eos, config, generation)


def _resolve(model: str | Path, revision: str) -> Path:
    path = Path(model)
    if path.exists():
        return path
    name = str(model)
    if name.startswith("builtin:"):
        raise InputError(f"{name} is not a folder yet; materialise the built-in model first and pass its folder")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"model folder {name} does not exist; give an existing folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} is no folder and could not be fetched from the hub ({reason}); give a folder"
        ) from error


def _read_json(path: Path) -> Json:
    if not path.is_file():
        return {}
    _refuse_endless(path)
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object; fetch the file again")
    return content


def _read_hf(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    try:
        backend = Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises plain Exception for anything it cannot parse, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(f"{file} is not a tokenizer this version of tokenizers can read ({error})") from error
    _refuse_other_ids(file, backend, where)
    return _from_backend(backend, where, tokenizer_config)


def _refuse_other_ids(file: Path, backend: Tokenizer, where: str) -> None:
    """Raises InputError where the file gives two texts one id, or an added token another id than the library does.

    The library says nothing of either: of two texts it keeps one, by chance, and it numbers added tokens anew.
    """
    room_for(backend.get_vocab(True).values(), where)
    if backend.get_vocab_size(with_added_tokens=False) != len(set(backend.get_vocab(False).values())):
        refuse_twins(backend.get_vocab(False), where)
    added = _read_json(file).get("added_tokens") or []
    stated = {str(entry.get("content")): entry.get("id") for entry in added if isinstance(entry, dict)}
    room_for([i for i in stated.values() if is_whole(i)], where)
    for content, i in stated.items():
        used = backend.token_to_id(content)
        if not same(i, used):
            taken = backend.id_to_token(i) if is_whole(i, 0) else None
            why = f"is {taken!r}" if taken is not None else "leaves a gap"
            raise InputError(
                f"{file}: the added token {content!r} has id {i}, which {why}; the tokenizers library uses {used}: "
                "correct the file, or fetch it again"
            )


def _from_backend(backend: Tokenizer, where: str, tokenizer_config: Json) -> TokenizerFiles:
    # The library's own serialisation has resolved versions, defaults and the ids of added tokens.
    spec = json.loads(backend.to_str())
    named = {key: text for key in _SPECIAL_KEYS if (text := _text_of(tokenizer_config.get(key)))}
    table = table_from_json(spec, where, frozenset(named.values()))
    _add_declared(table, tokenizer_config, where)
    bos, eos = (table.names.get(named[key]) if key in named else None for key in ("bos_token", "eos_token"))

    def make_encoder(final: list[bytes | None]) -> Encoder:
        return HfEncoder(spec, frozenset(i for i, data in enumerate(final) if data is None), where)

    return TokenizerFiles(where, table, make_encoder, bos=bos, eos=eos)


def _text_of(entry: Any) -> str:
    """A special token in a configuration: its text, or an object with `content`."""
    return str(entry.get("content") or "") if isinstance(entry, dict) else str(entry or "")


def _id_of(value: Any, name: str, where: str) -> int:
    """An id, which a configuration may spell as text. Raises InputError for what is none; `name`: of its file."""
    spelled = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value)
    if not spelled and not is_whole(value):
        raise InputError(f"{name} of {where}: {str(value)[:40]!r} is no token id; fetch it again")
    room_for([int(value)], where)
    return int(value)


def _declared(tokenizer_config: Json, where: str) -> Iterator[tuple[int, str, bool]]:
    """(id, text, whether it is special) of tokens that tokenizer_config.json declares. Raises InputError."""
    declared = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise InputError(f"tokenizer_config.json of {where}: added_tokens_decoder is no object; fetch it again")
    for key, entry in declared.items():
        special = not isinstance(entry, dict) or bool(entry.get("special", True))
        yield _id_of(key, "tokenizer_config.json", where), _text_of(entry), special


def _add_declared(table: TokenTable, tokenizer_config: Json, where: str) -> None:
    """Tokens that only tokenizer_config.json declares: the model may give them mass, the encoder never makes them."""
    for i, content, special in _declared(tokenizer_config, where):
        if not content or content in table.names:
            continue
        table.token_bytes.extend([None] * (i + 1 - len(table.token_bytes)))
        if table.token_bytes[i] is None and not special:
            table.token_bytes[i] = content.encode()
        table.names[content] = i


def _read_model(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    """A SentencePiece model; some checkpoints give that name to a file of ranks."""
    content = file.read_bytes()
    if _RANK_LINE.match(content):
        return _read_ranks(file, where, tokenizer_config)
    try:
        encoder = SentencePieceEncoder(content, where)
    except InputError as error:
        raise InputError(f"{file}: {error}; fetch the file again, or put a tokenizer.json beside it") from error
    table = table_from_sentencepiece(encoder.pieces, where)
    for text, i in _read_json(file.parent / "added_tokens.json").items():
        _declare(table, str(text), _id_of(i, "added_tokens.json", where), special=True)
    for i, text, special in _declared(tokenizer_config, where):
        _declare(table, text, i, special=special)
    named = {key: text for key in _SPECIAL_KEYS if (text := _text_of(tokenizer_config.get(key)))}
    for text in named.values():
        if text in table.names and len(text) > 1:
            table.token_bytes[table.names[text]] = None
    ids = {"bos_token": encoder.pieces.bos, "eos_token": encoder.pieces.eos}
    bos, eos = (
        table.names.get(named[key]) if key in named else (ids[key] if ids[key] >= 0 else None)
        for key in ("bos_token", "eos_token")
    )
    return TokenizerFiles(where, table, lambda _: encoder, bos=bos, eos=eos)


def _declare(table: TokenTable, text: str, i: int, *, special: bool) -> None:
    """A token that files beside a SentencePiece model declare, new or in a piece's place; the model never cuts it."""
    if not text or table.names.get(text) == i:
        return
    table.token_bytes.extend([None] * (room_for([i], "the model") - len(table.token_bytes)))
    table.token_bytes[i] = None if special else text.encode()
    table.names[text] = i


def _read_ranks(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    known = RANK_FILES.get(file.stem)
    if known is None:
        raise InputError(
            f"{file}: a rank file does not say how text is cut and this one is not known "
            f"({', '.join(sorted(RANK_FILES))} are); put the model's tokenizer.json beside it"
        )
    pattern, special = known
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                encoded, number_text = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(number_text)
            except ValueError as error:
                raise InputError(f"{file} line {number} is no `base64 rank` pair ({error}); fetch it again") from error
    table: list[bytes | None] = [None] * room_for([*ranks.values(), *special.values()], where)
    refuse_twins({repr(data): rank for data, rank in ranks.items()}, where, "ranks")
    for data, rank in ranks.items():
        table[rank] = data
    return TokenizerFiles(
        where,
        TokenTable("tiktoken", table, dict(special), frozenset()),
        lambda _: RankEncoder(ranks, pattern),
        eos=special["<|endoftext|>"],
    )


def _read_tekken(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    content = _read_json(file)
    try:
        config = content["config"]
        n_special, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        # The file lists more entries than the model has rows; only the first ones are live.
        live = content["vocab"][: size - n_special]
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in live}
        pattern = config["pattern"]
        listed = content.get("special_tokens") or []
        special = {entry["token_str"]: int(entry["rank"]) for entry in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no Tekken vocabulary ({error!r}); fetch the file again") from error
    # Files from before the list existed all begin like this.
    special = special or {"<unk>": 0, "<s>": 1, "</s>": 2}
    room_for([size - 1], where)
    highest = 1 + max([*special.values(), *(rank + n_special for rank in ranks.values())], default=-1)
    if not 0 <= n_special <= size or highest > size:
        raise InputError(
            f"{file} is no Tekken vocabulary (ids up to {highest - 1}, {n_special} of them special, in {size}); "
            "fetch the file again"
        )
    refuse_twins({repr(data): rank for data, rank in ranks.items()}, where, "ranks")
    table: list[bytes | None] = [None] * size
    for data, rank in ranks.items():
        table[rank + n_special] = data
    return TokenizerFiles(
        where,
        TokenTable("tekken", table, special, frozenset({special["<unk>"]} if "<unk>" in special else ())),
        lambda _: RankEncoder(ranks, pattern, offset=n_special),
        bos=special.get("<s>"),
        eos=special.get("</s>"),
    )


def _read_rwkv(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    pieces: dict[int, bytes] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        # `id literal length`; the literal may itself hold spaces.
        try:
            head, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            if not isinstance(value, str | bytes):
                raise ValueError(f"a {type(value).__name__}, not text or bytes")
            data = value.encode() if isinstance(value, str) else value
            if len(data) != int(length):
                raise ValueError(f"{len(data)} bytes, not {length}")
            pieces[int(head)] = data
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the last two: nested too deep
            raise InputError(f"{file} line {number} is no `id literal length` row ({error}); fetch it again") from error
    table: list[bytes | None] = [pieces.get(i) for i in range(room_for(pieces, where) or 1)]

    def make_encoder(final: list[bytes | None]) -> Encoder:
        order = sort_tokens(final)
        return GreedyEncoder(build_trie(final, order), order)

    # Id 0 is in no file: it both starts and ends documents.
    return TokenizerFiles(
        where, TokenTable("rwkv", table, {"<|endoftext|>": 0}, frozenset()), make_encoder, bos=0, eos=0
    )


def _convert_slow(folder: Path, where: str, trust_remote_code: bool) -> Tokenizer:
    if trust_remote_code:
        return _convert_by_its_code(folder, where)
    try:
        with opened(folder, f"the tokenizer of {where}") as tokenizer:
            facts = tokenizer.facts()
    except UnopenedError as error:
        raise InputError(f"no tokenizer found in {where} ({error.reason}); add its tokenizer.json") from error
    if facts.spec is None:
        raise InputError(f"the tokenizer of {where} ({facts.class_name}) has no fast form; add a tokenizer.json")
    return Tokenizer.from_str(facts.spec)


def _convert_by_its_code(folder: Path, where: str) -> Tokenizer:
    """The same where the user lets code of the checkpoint run, which then runs here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # transformers raises many kinds for a folder without a tokenizer
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"no tokenizer found in {where} ({reason}); add its tokenizer.json") from error
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer of {where} ({type(tokenizer).__name__}) has no fast form; add a tokenizer.json"
        )
    return backend
