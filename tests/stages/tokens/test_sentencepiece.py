"""Teachers with a SentencePiece model alone: cut as Google's own library cuts, every id its own bytes."""

import io
import json
from pathlib import Path

import pytest

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens import guard
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary
from tests.support.tiny_models import PROSE

sentencepiece = pytest.importorskip("sentencepiece")
CODE = "def f(x):\n    if x:\n        return [x, 1]\n\treturn  'a'\n\n\n"
TEXTS = [
    "", " ", "  ", "a", " a", "  a  b ", CODE, PROSE, "\n", "\n\n    x", "\t\tx", "e\u0301\u00e9 \ufb01 \u00bd \uff21",
    "\u65e5\u672c\u8a9e \U0001f600", "1234567", "</s><s><unk>[INST]", "<0x41>", "a\x00b", "\u00a0\u3000x", "MiXed",
]  # fmt: skip
MARKED = ["\u2581", "a\u2581b", " \u2581 \u2581x", "\u2581a b"]
FAITHFUL = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def train(**options: object) -> bytes:
    """A small model of prose and code."""
    model = io.BytesIO()
    lines = [*PROSE.split(". "), *CODE.splitlines()] * 20
    given = {"model_type": "bpe", "vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **given)
    return model.getvalue()


def folder_of(path: Path, model: bytes, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    (path / "config.json").write_text(json.dumps({"model_type": "mistral", **config}))
    return path


def assert_as_the_library(vocabulary: Vocabulary, model: bytes, texts: list[str]) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text, encoded in zip(texts, vocabulary.encode_batch(texts), strict=True):
        assert isinstance(encoded, Encoded), f"{text!r}: {encoded}"
        assert encoded.ids.tolist() == library.encode(text), repr(text)
        assert b"".join(vocabulary.token_bytes[i] or b"" for i in encoded.ids.tolist()) == encoded.data
        assert encoded.data == b" " * encoded.synthetic + text.encode()


@pytest.mark.parametrize("options", [
    {}, {"model_type": "unigram"}, {"add_dummy_prefix": False},
    {"split_digits": True, "allow_whitespace_only_pieces": True},
    {"user_defined_symbols": ["<tool>", "  "], "control_symbols": ["[INST]"]}, {"eos_id": -1, "pad_id": 3},
], ids=str)  # fmt: skip
def test_texts_are_cut_as_sentencepiece_cuts_them(tmp_path: Path, options: dict[str, object]) -> None:
    model = train(**FAITHFUL, **options)
    vocabulary = load_vocabulary(folder_of(tmp_path, model), end="<s>" if "eos_id" in options else "auto")
    assert_as_the_library(vocabulary, model, TEXTS)
    if "[INST]" in str(options):
        control = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("[INST]")
        assert vocabulary.token_bytes[control] is None and vocabulary.control_names["[INST]"] == control
        assert vocabulary.token_bytes[vocabulary.token_id("<tool>")] == b"<tool>"


@pytest.mark.parametrize("prefix", [True, False])
def test_the_letter_that_stands_for_a_space_is_spelled_by_its_bytes(tmp_path: Path, prefix: bool) -> None:
    vocabulary = load_vocabulary(folder_of(tmp_path, train(**FAITHFUL, add_dummy_prefix=prefix)))
    for text, encoded in zip(MARKED, vocabulary.encode_batch(MARKED), strict=True):
        assert isinstance(encoded, Encoded)
        assert encoded.data == text.encode() and encoded.synthetic == 0


def test_start_and_end_are_the_models_own_unless_files_beside_it_say_otherwise(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train(**FAITHFUL))
    assert (load_vocabulary(folder).start_id, load_vocabulary(folder).end_ids.tolist()) == (1, [2])
    size = load_vocabulary(folder).size
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    declared = {"5": {"content": "<|im_start|>", "special": True}, str(size + 1): {"content": "x y", "special": False}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": declared})
    )
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.size, vocabulary.end_ids.tolist()) == (size + 2, [size])
    assert vocabulary.token_bytes[5] is None and vocabulary.control_names["<|im_start|>"] == 5
    assert vocabulary.token_bytes[size + 1] == b"x y"


def test_without_byte_fallback_unknown_letters_set_a_text_aside(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(folder_of(tmp_path, train(**{**FAITHFUL, "byte_fallback": False})))
    known, unknown, mark = vocabulary.encode_batch(["the notes", "the \U0001f600", "\u2581"])
    assert isinstance(known, Encoded)
    assert isinstance(unknown, Misfit) and unknown.reason == "unk"
    assert isinstance(mark, Misfit)


@pytest.mark.parametrize(("options", "why"), [
    ({}, "joins spaces"),
    ({"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False}, "compatibility form"),
    ({"normalization_rule_name": "identity"}, "joins spaces"),
    ({**FAITHFUL, "normalization_rule_name": "nfkc_cf"}, "compatibility form"),
    ({**FAITHFUL, "treat_whitespace_as_suffix": True}, "behind it"),
], ids=str)  # fmt: skip
def test_models_that_change_text_are_refused(tmp_path: Path, options: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        load_vocabulary(folder_of(tmp_path, train(**options)))


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"\x00\x01 no model")
    with pytest.raises(InputError, match=r"tokenizer\.model: no SentencePiece model.*tokenizer\.json"):
        load_vocabulary(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"tokenizer\.model: a rank file does not say.*tokenizer\.json"):
        load_vocabulary(folder)


@pytest.mark.slow
def test_a_text_that_takes_too_long_is_set_aside_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "encoding_limits", lambda texts: guard.Limits(0.5, 8192 * guard.MIB))
    vocabulary = load_vocabulary(folder_of(tmp_path, train(**FAITHFUL, model_type="unigram")))
    found = vocabulary.encode_batch(["the notes", "the " * 4_000_000, "of the"])
    assert [isinstance(one, Encoded) for one in found] == [True, False, True]
    assert isinstance(found[1], Misfit) and found[1].reason == "tokenizer: too slow"


@pytest.mark.parametrize(("file", "content"), [
    ("added_tokens.json", {"x": "y"}), ("added_tokens.json", {"x": None}), ("added_tokens.json", {"x": -1}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
], ids=str)  # fmt: skip
def test_files_beside_a_model_that_name_no_ids_are_refused(tmp_path: Path, file: str, content: object) -> None:
    folder = folder_of(tmp_path, train(**FAITHFUL))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match="fetch"):
        load_vocabulary(folder)


def test_a_tokenizer_json_beside_it_wins(tmp_path: Path) -> None:
    from tests.support.tiny_models import byte_level_tokenizer

    folder = folder_of(tmp_path, train(**FAITHFUL), eos_token_id=1)
    byte_level_tokenizer(300).save(str(folder / "tokenizer.json"))
    assert load_vocabulary(folder).family == "byte-level"


@pytest.mark.slow
def test_the_models_that_a_package_carries() -> None:
    """Mistral's, all versions, against the library; transformers cuts each of them otherwise."""
    common = pytest.importorskip("mistral_common")
    files = sorted((Path(common.__file__).parent / "data").glob("*.model*"))
    if not files:
        pytest.skip("this mistral_common carries no SentencePiece model")
    for file in files:
        assert_as_the_library(load_vocabulary(file), file.read_bytes(), TEXTS)
