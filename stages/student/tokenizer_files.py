"""The student's tokenizer as files: kept to the byte, opened as they stand, checked against the original.

`tokenizer.json` and its company are copied and never saved anew. AutoTokenizer of transformers 5 rebuilds a
tokenizer.json from the defaults of the class that a configuration names (a byte-level one under `LlamaTokenizerFast`
becomes one that drops spaces), so a copy's tokenizer_config.json names `PreTrainedTokenizerFast`, which transformers 4
and 5 both take as it stands; nothing else in it changes. Beside some architectures (Qwen2) version 5 takes a class of
its own whatever is named, unless an `auto_map` names code of the checkpoint, which nobody lets run: such a folder
gets one. Where there is no tokenizer.json, what transformers makes of the other files is taken only if it cuts
`AWKWARD` as the library that those files were made for. What transformers makes of a stranger's folder, and all
cutting, is `stages.tokens.library`'s: in a child where it might not end.
Price: two openings of the tokenizer, 1 s at 50k tokens, and 3 s for a child.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from bytecache.schemas import strict_json
from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.cutters import blows_up
from bytecache.stages.tokens.guard import UnopenedError, is_panic
from bytecache.stages.tokens.library import opened
from bytecache.stages.tokens.template_files import refuse_unusable
from bytecache.stages.tokens.token_files import open_tokenizer

CLASS = "PreTrainedTokenizerFast"
"""The class that opens a tokenizer.json as it stands."""
AS_IT_STANDS = {"AutoTokenizer": [CLASS, CLASS]}
"""An `auto_map` that names code which is not there: transformers 5 then takes the named class, as version 4 does."""
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
        InputError: no tokenizer.json, and nothing that transformers turns into an equal one; a normaliser that makes
            more of a text than anybody can hold.
    """
    config = _read(source / "tokenizer_config.json")
    if (source / "tokenizer.json").is_file():
        if blows_up(_read(source / "tokenizer.json")):
            raise InputError(f"{where}: its normaliser makes a long text of every letter; choose another tokenizer")
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
        for name in COMPANY:
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
        if (source / "additional_chat_templates").is_dir():
            shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates")
    else:
        spec, names = _converted(source, where)
        (out / "tokenizer.json").write_text(spec, encoding="utf-8")
        config |= names
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
    (folder / "tokenizer_config.json").write_text(_spelled(config), encoding="utf-8")


def _spelled(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def open_kept(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as its tokenizer.json stands. Raises InputError."""
    refuse_unusable(folder, f"the tokenizer in {folder}")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except BaseException as error:  # the library raises plain Exception, or panics, for files it cannot parse
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer in {folder} cannot be opened ({reason}); fetch it again") from error
    return tokenizer


def check_kept(folder: Path, where: str) -> list[str]:
    """Compare what transformers opens in a folder with the tokenizer.json there; see to it that they agree.

    Returns:
        Notes for whoever uses the folder, one sentence each: a start token that is asked for and not in tokenizer.json.

    Raises:
        InputError: the tokenizer cannot be had as its tokenizer.json says.
    """
    try:
        with opened(folder, where) as tokenizer:
            if wrong := tokenizer.differences(AWKWARD, auto=False):
                raise InputError(f"{where}: transformers {wrong}; choose another tokenizer")
            begins = tokenizer.ids(["a"], auto=False, special=True)[0]
    except UnopenedError as error:
        raise InputError(f"{where}: transformers cannot open its tokenizer ({error.reason}); choose another") from error
    config = _read(folder / "tokenizer_config.json")
    if _of_auto(folder, where):
        (folder / "tokenizer_config.json").write_text(_spelled(config | {"auto_map": AS_IT_STANDS}), encoding="utf-8")
        if wrong := _of_auto(folder, where):
            raise InputError(
                f"{where}: beside this architecture AutoTokenizer builds a tokenizer of its own, which {wrong}; so "
                "whoever opens the student would cut text otherwise than it was trained: choose another student.model, "
                "or its own tokenizer"
            )
    kept = open_kept(folder)
    if config.get("add_bos_token") and kept.bos_token_id is not None and kept.bos_token_id not in begins:
        return [
            f"{where}: add_bos_token is set and its tokenizer.json adds none; put {kept.bos_token!r} in front of texts"
        ]
    return []


def _of_auto(folder: Path, where: str) -> str:
    """How AutoTokenizer cuts otherwise than the folder's tokenizer.json, or that it cannot open it; "" if as it."""
    try:
        with opened(folder, where) as tokenizer:
            return tokenizer.differences(AWKWARD, auto=True)
    except UnopenedError as error:
        return f"cannot be opened ({error.reason[:120]})"


def _converted(source: Path, where: str) -> tuple[str, dict[str, str]]:
    """What transformers makes of a folder without tokenizer.json, if it cuts as the files' own library does.

    Returns the tokenizer.json, and its start and end tokens by name.
    """
    files = open_tokenizer(source)
    expected = files.make_encoder(list(files.table.token_bytes)).canonical(AWKWARD)
    try:
        with opened(source, where) as tokenizer:
            facts = tokenizer.facts()
            made = tokenizer.ids(AWKWARD, auto=True)
    except UnopenedError as error:
        raise InputError(
            f"{where}: no tokenizer.json, and transformers cannot make one ({error.reason}); add one"
        ) from error
    if facts.spec is None:
        raise InputError(f"{where}: no tokenizer.json, and transformers has no fast form of it; add one")
    wrong = [text for text, ids, cut in zip(AWKWARD, expected, made, strict=True) if cut != ids]
    if wrong:
        raise InputError(
            f"{where}: no tokenizer.json, and what transformers makes of its other files cuts {len(wrong)} of "
            f"{len(AWKWARD)} texts otherwise than they do, {wrong[0][:24]!r} first; add the model's own tokenizer.json"
        )
    return facts.spec, {key: facts.names[key] for key in ("bos_token", "eos_token") if key in facts.names}


def _named_by_class(source: Path, out: Path) -> dict[str, str]:
    """Start and end tokens that only the class of the original names, and that its tokenizer.json calls special."""
    try:
        with opened(source, "the original") as tokenizer:
            names = tokenizer.facts().names
    except UnopenedError:
        return {}  # a class of remote code, or of another version: what its files say has to do
    kept = open_kept(out)
    special = {token.content for token in kept.backend_tokenizer.get_added_tokens_decoder().values() if token.special}
    return {
        key: text
        for key in ("bos_token", "eos_token")
        if getattr(kept, key) is None and (text := str(names.get(key))) in special
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not an object; fetch it again")
    return content
