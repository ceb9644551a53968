"""Ids that no vocabulary has, and texts that share one, are refused by name before memory is taken for them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.token_bytes import MAX_IDS
from bytecache.stages.tokens.vocab import load_vocabulary

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def spec() -> dict[str, Any]:
    made = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    loaded: dict[str, Any] = json.loads(made.to_str())
    return loaded


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_vocabulary(folder, start="<|end|>", end="<|end|>")


def write(folder: Path, tokenizer: dict[str, Any], **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_sound_one_loads(tmp_path: Path) -> None:
    assert load_vocabulary(write(tmp_path, spec()), start="<|end|>", end="<|end|>").size == 257


def test_two_tokens_of_one_id(tmp_path: Path) -> None:
    twins = spec()
    twins["model"]["vocab"]["ab"] = 5
    refused(write(tmp_path, twins), "have the same id 5")


@pytest.mark.parametrize(("i", "words"), [
    (5, "the added token '<x>' has id 5, which is '.*'; the tokenizers library uses 257"),
    (256, "'<x>' has id 256, which is '<.*>'; the tokenizers library uses 257"),
    (300, "'<x>' has id 300, which leaves a gap"),
    (10**9, f"a token has id 1000000000, ids are 0..{MAX_IDS - 1}"),
    (2**32 - 1, "a token has id 4294967295"),
])  # fmt: skip
def test_added_tokens_with_ids_of_others(i: int, words: str, tmp_path: Path) -> None:
    changed = spec()
    changed["added_tokens"].append({"id": i, "content": "<x>", **ADDED})
    refused(write(tmp_path, changed), words)


@pytest.mark.parametrize("i", [10**9, 2**32 - 1, MAX_IDS])
def test_a_piece_with_an_id_beyond_all_vocabularies(i: int, tmp_path: Path) -> None:
    changed = spec()
    changed["model"]["vocab"]["ab"] = i
    refused(write(tmp_path, changed), f"a token has id {i}, ids are")


@pytest.mark.parametrize(("key", "words"), [
    ("1000000000", "a token has id 1000000000"), ("-5", "a token has id -5"), ("x", "'x' is no token id"),
])  # fmt: skip
def test_ids_that_the_configuration_declares(key: str, words: str, tmp_path: Path) -> None:
    declared = {"added_tokens_decoder": {key: {"content": "<y>", "special": True}}}
    refused(write(tmp_path, spec(), tokenizer_config=declared), words)
    refused(write(tmp_path, spec(), tokenizer_config={"added_tokens_decoder": [1]}), "is no object")


@pytest.mark.parametrize("size", [10**9, MAX_IDS + 1])
def test_a_head_beyond_all_vocabularies(size: int, tmp_path: Path) -> None:
    refused(write(tmp_path, spec(), config={"vocab_size": size}), f"a token has id {size - 1}")


def test_rank_files(tmp_path: Path) -> None:
    lines = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_text("\n".join([*lines, "YWI= 1000000000"]) + "\n")
    refused(tmp_path, "a token has id 1000000000")
    file.write_text("\n".join([*lines, "YWI= 97"]) + "\n")
    refused(tmp_path, "have the same id 97")


def test_tekken_files(tmp_path: Path) -> None:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    config = {"default_num_special_tokens": 3, "default_vocab_size": 259, "pattern": r"\s+"}
    for changes, words in (
        ({"default_vocab_size": 10**9}, "a token has id 999999999"),
        ({"default_num_special_tokens": -1}, "is no Tekken vocabulary"),
        ({"default_num_special_tokens": 300}, "is no Tekken vocabulary"),
    ):
        (tmp_path / "tekken.json").write_text(json.dumps({"config": config | changes, "vocab": vocab}))
        refused(tmp_path, words)
    (tmp_path / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": [*vocab[:-1], vocab[0] | {"rank": 9}]})
    )
    refused(tmp_path, "have the same id 9|is no Tekken vocabulary")


def test_rwkv_files(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_x.txt").write_text("1 'a' 1\n1000000000 'b' 1\n")
    refused(tmp_path, "a token has id 1000000000")


NAMES = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_nested_too_deep(name: str, tmp_path: Path) -> None:
    (write(tmp_path, spec()) / name).write_text('{"a":' * 100_000)
    refused(tmp_path, f"{name} is not valid JSON .nested too deep")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_files_that_no_tokenizer_has(name: str, tmp_path: Path) -> None:
    """A file of a few blocks may have any length."""
    with (write(tmp_path, spec()) / name).open("ab") as file:
        file.truncate(1 << 36)
    refused(tmp_path, f"{name} has {1 << 36} bytes, a tokenizer's files at most")


@pytest.mark.parametrize("size", [True, "5", 1.5, [3]])
def test_a_size_that_is_no_number(size: Any, tmp_path: Path) -> None:
    refused(write(tmp_path, spec(), config={"vocab_size": size}), "vocab_size is")
