"""The student's tokenizer as files: kept to the byte, opened as they stand, checked against the original.

`tokenizer.json` and its company are copied and never saved anew. AutoTokenizer of transformers 5 rebuilds a
tokenizer.json from the defaults of the class that a configuration names (a byte-level one under `LlamaTokenizerFast`
becomes one that drops spaces), so a copy's tokenizer_config.json names `PreTrainedTokenizerFast`, which transformers 4
and 5 both take as it stands; nothing else in it changes. Where there is no tokenizer.json, what transformers makes of
the other files is taken only if it cuts `AWKWARD` as the library that those files were made for.
Price: two openings of the tokenizer, 1 s at 50k tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.guard import is_panic
from bytecache.stages.tokens.token_files import open_tokenizer

CLASS = "PreTrainedTokenizerFast"
"""The class that opens a tokenizer.json as it stands."""
COMPANY = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tekken.json",
)  # fmt: skip
"""What may lie beside a tokenizer.json and belongs to it."""
AWKWARD = (
    "Hello world, how are you?", " Hello", "  two  spaces ", "It's what they'd've said; DON'T", "        ", "\n\n\n",
    "def f(x):\n    return x\n\n\n\tif x:\r\n        y = 10_000\n", "a\tb\nc\r\nd", "1234567890 3.14 2,000",
    "na\u00efve cafe\u0301 \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d",
    "\u65e5\u672c\u8a9e\ud55c\uad6d",
    "\U0001f600\U0001f468\u200d\U0001f469", "\ufb01 \u00bd \uff21 \u00a0 \u3000", "\x00\x01\x7f",
    "<s>[INST] x [/INST]</s><|im_end|>", "http://a.b/c?d=e&f=%20#g", 'x=1;y=22;z=333 /* c */ {"k": [1, 2]}',
)  # fmt: skip
"""Texts that tokenizers built from other defaults cut otherwise: spaces, indentation, numbers, accents, look-alikes."""


def keep(source: Path, out: Path, where: str) -> None:
    """Copy the tokenizer of a folder into `out`.

    Args:
        where: names the source in messages, as `student.tokenizer = ...`.

    Raises:
        InputError: no tokenizer.json, and nothing that transformers turns into an equal one.
    """
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
        for name in COMPANY:
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
        if (source / "additional_chat_templates").is_dir():
            shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates")
        config = _read(source / "tokenizer_config.json")
    else:
        tokenizer = _converted(source, where)
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
        config = _read(source / "tokenizer_config.json") | _named(tokenizer)
    write_config(out, config)
    if not {"bos_token", "eos_token"} <= config.keys() and (named := _named_by_class(source, out)):
        write_config(out, config | named)


def write_new(tokenizer: tokenizers.Tokenizer, out: Path, config: dict[str, Any]) -> None:
    """Write a tokenizer that was made here; `config`: its start and end token and its template."""
    tokenizer.save(str(out / "tokenizer.json"))
    write_config(out, {**config, "clean_up_tokenization_spaces": False})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer_config.json with a class that transformers 4 knows and transformers 5 opens as it stands."""
    config = {**config, "tokenizer_class": CLASS}
    config.pop("auto_map", None)
    # transformers 5 writes a list under a name that transformers 4 reads as a dictionary.
    if isinstance(config.get("extra_special_tokens"), list):
        config.setdefault("additional_special_tokens", config["extra_special_tokens"])
        del config["extra_special_tokens"]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def open_kept(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as its tokenizer.json stands. Raises InputError."""
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except BaseException as error:  # the library raises plain Exception, or panics, for files it cannot parse
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer in {folder} cannot be opened ({reason}); fetch it again") from error
    return tokenizer


def differences(tokenizer: Any, file: Path) -> str:
    """How a tokenizer of transformers cuts and joins `AWKWARD` otherwise than its tokenizer.json; "" if it does not."""
    original = tokenizers.Tokenizer.from_file(str(file))
    original.no_truncation()
    original.no_padding()
    wrong = []
    for text in AWKWARD:
        ids = original.encode(text, add_special_tokens=False).ids
        joined = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            wrong.append(f"cuts {text[:24]!r} otherwise")
        elif joined != original.decode(ids, skip_special_tokens=False):
            wrong.append(f"joins the tokens of {text[:24]!r} otherwise")
    return f"{wrong[0]}, and {len(wrong) - 1} more of {len(AWKWARD)}" if wrong else ""


def check_kept(folder: Path, where: str) -> list[str]:
    """Compare what transformers opens in a folder with the tokenizer.json there.

    Returns:
        Notes for whoever uses the folder, one sentence each: AutoTokenizer forces a class on some architectures; a
        start token that is asked for and not in tokenizer.json.

    Raises:
        InputError: the tokenizer cannot be had as its tokenizer.json says.
    """
    file = folder / "tokenizer.json"
    tokenizer = open_kept(folder)
    if wrong := differences(tokenizer, file):
        raise InputError(f"{where}: transformers {wrong}; choose another tokenizer")
    notes = []
    try:
        wrong = differences(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), file)
    except Exception as error:  # whatever its classes raise
        wrong = f"cannot open it ({' '.join(str(error).split())[:120]})"
    if wrong:
        notes.append(
            f"{where}: for this architecture AutoTokenizer builds a tokenizer of its own, which {wrong}; open it with "
            f"{CLASS}.from_pretrained"
        )
    start = tokenizer.bos_token_id
    asked = _read(folder / "tokenizer_config.json").get("add_bos_token")
    if asked and start is not None and start not in tokenizer("a")["input_ids"]:
        notes.append(
            f"{where}: add_bos_token is set and its tokenizer.json adds none; "
            f"put {tokenizer.bos_token!r} in front of texts"
        )
    return notes


def _converted(source: Path, where: str) -> Any:
    """What transformers makes of a folder without tokenizer.json, if it cuts as the files' own library does."""
    files = open_tokenizer(source)
    expected = files.make_encoder(list(files.table.token_bytes)).canonical(AWKWARD)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{where}: no tokenizer.json, and transformers cannot make one ({reason}); add one") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"{where}: no tokenizer.json, and transformers has no fast form of it; add one")
    wrong = [
        text
        for text, ids in zip(AWKWARD, expected, strict=True)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids
    ]
    if wrong:
        raise InputError(
            f"{where}: no tokenizer.json, and what transformers makes of its other files cuts {len(wrong)} of "
            f"{len(AWKWARD)} texts otherwise than they do, {wrong[0][:24]!r} first; add the model's own tokenizer.json"
        )
    return tokenizer


def _named_by_class(source: Path, out: Path) -> dict[str, str]:
    """Start and end tokens that only the class of the original names, and that its tokenizer.json calls special."""
    try:
        original = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return {}  # a class of remote code, or of another version: what its files say has to do
    tokenizer = open_kept(out)
    special = {
        token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special
    }
    return {
        key: text
        for key in ("bos_token", "eos_token")
        if getattr(tokenizer, key) is None and (text := str(getattr(original, key, None))) in special
    }


def _named(tokenizer: Any) -> dict[str, str]:
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return {key: text for key, text in names.items() if text is not None}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not an object; fetch it again")
    return content
