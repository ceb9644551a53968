"""Token bytes, alignment and the choice of start and end, on tokenizers built here."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary
from tests.support.vocab_models import added, byte_level, checkpoint, lossy, sentencepiece, without_byte_pieces

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  the a",
    "the cat\n\n",
    "a\tb\r\n",
    "the  end ",
    "\u00e9\u4f60\U0001f600",
    "\x00\x7f",
]
LOOK_ALIKE = "say <|im_end|> and </s><s> <unk> <|endoftext|>."
EOS = {"tokenizer_config": {"eos_token": "<|endoftext|>"}}
SP_EOS = {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}
SETTINGS = settings(max_examples=60, deadline=None)


def assert_aligned(vocab: Vocabulary, text: str, encoded: Encoded) -> None:
    pieces = [vocab.token_bytes[i] for i in encoded.ids.tolist()]
    assert b"".join(p for p in pieces if p) == encoded.data
    assert all(pieces), "a token of text carries no bytes"
    assert encoded.data == b" " * encoded.synthetic + text.encode()
    assert encoded.ids.dtype == np.int32
    assert encoded.starts.dtype == np.int64
    assert encoded.starts.tolist() == np.cumsum([0, *(len(p or b"") for p in pieces)]).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vocab")
    checkpoint(root / "bytes", byte_level(), **EOS)
    checkpoint(root / "prefixed", byte_level(prefix=True), **EOS)
    checkpoint(root / "gaps", byte_level(alphabet=False), **EOS)
    for style in ("prepend", "metaspace", "none"):
        checkpoint(root / style, sentencepiece(style=style), **SP_EOS)
    checkpoint(root / "nobytes", sentencepiece(byte_fallback=False), **SP_EOS)
    checkpoint(root / "unmarked", without_byte_pieces(sentencepiece()), **SP_EOS)
    return root


@pytest.mark.parametrize("name", ["bytes", "prefixed", "prepend", "metaspace", "none"])
def test_every_text_is_spelled_exactly(folder: Path, name: str) -> None:
    vocab = load_vocabulary(folder / name)
    texts = [*TEXTS, LOOK_ALIKE]
    for text, encoded in zip(texts, vocab.encode_batch(texts), strict=True):
        assert isinstance(encoded, Encoded), f"{text!r}: {encoded}"
        assert_aligned(vocab, text, encoded)
        assert not {vocab.start_id, *vocab.end_ids.tolist()} & set(encoded.ids.tolist())
    empty = vocab.encode("")
    assert (len(empty.ids), empty.starts.tolist(), empty.data, empty.synthetic) == (0, [0], b"", 0)


def test_the_synthetic_space_is_reported_only_where_one_was_put(folder: Path) -> None:
    seen = {
        name: [load_vocabulary(folder / name).encode(text).synthetic for text in ("a", " a", "  a")]
        for name in ("bytes", "prefixed", "prepend", "metaspace", "none")
    }
    # Prepend always adds one; the others only where the text does not begin with a space already.
    expected = {
        "bytes": [0, 0, 0],
        "prefixed": [1, 0, 0],
        "prepend": [1, 1, 1],
        "metaspace": [1, 0, 0],
        "none": [0, 0, 0],
    }
    assert seen == expected


@SETTINGS
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_spells_all_of_unicode(folder: Path, text: str) -> None:
    vocab = _cached(folder / "bytes")
    assert_aligned(vocab, text, vocab.encode(text))


@SETTINGS
@given(
    text=st.text(st.sampled_from("the a<s>/|\u00e9\u4f60\n\u2581"), max_size=20),
    style=st.sampled_from(["prepend", "metaspace", "none"]),
)
def test_sentencepiece_spells_even_its_own_space_mark(folder: Path, text: str, style: str) -> None:
    vocab = _cached(folder / style)
    assert_aligned(vocab, text, vocab.encode(text))


_VOCABULARIES: dict[Path, Vocabulary] = {}


def _cached(path: Path) -> Vocabulary:
    if path not in _VOCABULARIES:
        _VOCABULARIES[path] = load_vocabulary(path)
    return _VOCABULARIES[path]


def test_byte_letters_agree_with_the_library(folder: Path) -> None:
    """The library's own pre-tokeniser, run over every UTF-8 byte value, is an independent source for the alphabet."""
    vocab = load_vocabulary(folder / "bytes")
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    seen = set()
    for character in map(
        chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64), *range(0x10000, 0x110000, 4096)]
    ):
        (letters, _), *_ = cut.pre_tokenize_str(character)
        for letter, value in zip(letters, character.encode(), strict=True):
            assert vocab.token_bytes[vocab.token_id(letter)] == bytes([value])
            seen.add(value)
    assert len(seen) == 256 - 13  # 13 byte values occur in no UTF-8
    assert vocab.missing_bytes == []


def test_token_boundaries_agree_with_the_library(folder: Path) -> None:
    tokenizer = byte_level()
    text = "The quick brown fox  jumps\n over 1234 dogs."
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    encoded = load_vocabulary(folder / "bytes").encode(text)
    assert list(zip(encoded.starts[:-1].tolist(), encoded.starts[1:].tolist(), strict=True)) == offsets


def test_byte_pieces_and_spaces_of_sentencepiece(folder: Path) -> None:
    vocab = load_vocabulary(folder / "prepend")
    assert [vocab.token_bytes[3 + b] for b in range(256)] == [bytes([b]) for b in range(256)]
    assert vocab.token_bytes[vocab.token_id("\u2581the")] == b" the"
    assert vocab.token_bytes[:3] == [None, None, None]
    # "a" is both a letter and <0x61>: two ids, one byte string, the lower id first.
    pair = [i for i in vocab.order.tolist() if vocab.token_bytes[i] == b"a"]
    assert pair == sorted(pair)
    assert len(pair) == 2
    assert vocab.describe()["duplicates"] == 32


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gaps", "a\x01b", "missing-byte"),
        ("nobytes", "a\u4f60", "unk"),
        ("unmarked", "a\u2581b", "mismatch"),
        ("bytes", "a\ud800", "lone surrogate"),
    ],
)
def test_misfits_name_their_reason_and_spare_their_neighbours(folder: Path, name: str, text: str, reason: str) -> None:
    vocab = load_vocabulary(folder / name)
    before, misfit, after = vocab.encode_batch(["the", text, "fox" if name == "gaps" else "a"])
    assert isinstance(misfit, Misfit)
    assert misfit.reason == reason
    assert isinstance(before, Encoded)
    assert isinstance(after, Encoded)
    assert_aligned(vocab, "the", before)
    with pytest.raises(Misfit, match=reason):
        vocab.encode(text)


def test_unicode_normalisation_is_realigned(tmp_path: Path) -> None:
    for form in (normalizers.NFC(), normalizers.Sequence([normalizers.NFKC()])):
        vocab = load_vocabulary(checkpoint(tmp_path / "nfc", byte_level(unicode_form=form), **EOS))
        text = "cafe\u0301 \ufb01 \u0644\u064e\u0651"
        assert_aligned(vocab, text, vocab.encode(text))


def test_a_rewriting_normaliser_sets_documents_aside(tmp_path: Path) -> None:
    tokenizer = byte_level(unicode_form=normalizers.Replace("``", '"'))
    vocab = load_vocabulary(checkpoint(tmp_path, tokenizer, **EOS))
    assert_aligned(vocab, "plain", vocab.encode("plain"))
    with pytest.raises(Misfit, match="normalised"):
        vocab.encode("``quoted")


def test_added_tokens_are_literal_and_special_ones_are_control(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens(
        [added("<table>", normalized=False), added("\u00e9t\u00e9"), added("<unused7>"), added(" x ", lstrip=True)]
    )
    tokenizer.add_special_tokens(["<ctl>"])
    vocab = load_vocabulary(checkpoint(tmp_path, tokenizer, **SP_EOS))
    assert vocab.token_bytes[vocab.token_id("<table>")] == b"<table>"
    assert vocab.token_bytes[vocab.token_id("\u00e9t\u00e9")] == "\u00e9t\u00e9".encode()
    assert vocab.token_bytes[vocab.token_id("<unused7>")] is None
    assert vocab.token_bytes[vocab.token_id("<ctl>")] is None
    for text in ("a<table>b \u00e9t\u00e9", "<unused7> <ctl>", "a   x  b", "<table>"):
        assert_aligned(vocab, text, vocab.encode(text))
    assert vocab.token_id("<table>") in vocab.encode("a<table>b").ids


def test_spaces_injected_after_added_tokens_are_left_out(tmp_path: Path) -> None:
    tokenizer = sentencepiece(style="metaspace")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_tokens([added("<table>", normalized=False)])
    assert "\u2581b" not in tokenizer.get_vocab()
    vocab = load_vocabulary(checkpoint(tmp_path, tokenizer, **SP_EOS))
    encoded = vocab.encode("a<table>b")
    assert_aligned(vocab, "a<table>b", encoded)
    assert encoded.synthetic == 1


def test_a_padding_token_that_is_a_character_stays_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["!"])
    vocab = load_vocabulary(checkpoint(tmp_path, tokenizer, **EOS))
    assert_aligned(vocab, "no!", vocab.encode("no!"))


@pytest.mark.parametrize(
    ("config", "generation", "tokens", "start", "end"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, {"bos_token": "<|endoftext|>"}, 1, [2]),
        ({"eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": [2, 0]}, {}, 1, [0, 2]),
        ({}, {}, {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}, 1, [2]),
        ({"bos_token_id": None, "eos_token_id": [2]}, {}, {"eos_token": "<|endoftext|>"}, 2, [0, 2]),
        ({"eos_token_id": 2, "text_config": {"bos_token_id": 1, "eos_token_id": 0}}, {}, {}, 1, [0, 2]),
    ],
)
def test_start_and_end_follow_the_configuration(
    tmp_path: Path, config: dict, generation: dict, tokens: dict, start: int, end: list[int]
) -> None:
    files = {"config": config, "generation_config": generation, "tokenizer_config": tokens}
    vocab = load_vocabulary(checkpoint(tmp_path, byte_level(), **files))
    assert vocab.start_id == start
    assert vocab.end_ids.tolist() == end
    assert vocab.end_ids.dtype == np.int64


def test_start_and_end_by_text(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_level(), **EOS)
    vocab = load_vocabulary(folder, start="<|im_start|>", end="<|im_end|> <|endoftext|>")
    assert (vocab.start_id, vocab.end_ids.tolist()) == (1, [0, 2])
    plain = load_vocabulary(folder, end="\n")
    assert plain.token_bytes[int(plain.end_ids[0])] is None, "end tokens carry no bytes, whatever their text"
    with pytest.raises(InputError, match=r"teacher\.start = '<im_start>'.*did you mean '<\|im_start\|>'"):
        load_vocabulary(folder, start="<im_start>")
    bare = checkpoint(tmp_path / "bare", byte_level())
    with pytest.raises(InputError, match=r"teacher\.(start|end)"):
        load_vocabulary(bare)
    with pytest.raises(InputError, match=r"set teacher\.start"):
        load_vocabulary(bare, end="<|im_end|>")


def test_head_rows_pad_and_cut(tmp_path: Path) -> None:
    tokenizer = byte_level()
    length = tokenizer.get_vocab_size()
    tokenizer.add_tokens([added("<beyond>")])
    folder = checkpoint(tmp_path, tokenizer, config={"vocab_size": length + 64}, **EOS)
    wide = load_vocabulary(folder)
    assert wide.size == len(wide.token_bytes) == length + 64
    assert wide.token_bytes[length + 1 :] == [None] * 63
    cut = load_vocabulary(folder, lm_head_rows=length)
    assert cut.size == length
    # The added token has no row in this head, so its text is cut like any other.
    assert_aligned(cut, "a<beyond>", cut.encode("a<beyond>"))
    with pytest.raises(InputError, match=r"has id 9999, but the model has \d+ rows"):
        load_vocabulary(checkpoint(tmp_path / "x", byte_level(), config={"eos_token_id": 9_999}))


@pytest.mark.parametrize("word", sorted(lossy()))
def test_lossy_tokenizers_are_refused_with_a_remedy(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match=rf"{word}.*use a teacher with"):
        load_vocabulary(checkpoint(tmp_path, lossy()[word]), start="a", end="a")


def test_fingerprint_is_an_identity(folder: Path) -> None:
    first = load_vocabulary(folder / "bytes")
    assert first.fingerprint == load_vocabulary(folder / "bytes").fingerprint
    others = [
        load_vocabulary(folder / "bytes", start="<|im_start|>"),
        load_vocabulary(folder / "bytes", end="<|im_end|>"),
        load_vocabulary(folder / "bytes", lm_head_rows=first.size + 1),
        load_vocabulary(folder / "prepend"),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_dropout_padding_and_truncation_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_id=5, pad_token="x")
    tokenizer.model.dropout = 0.9
    vocab = load_vocabulary(checkpoint(tmp_path, tokenizer, **EOS))
    text = "The quick brown fox jumps over the lazy dog"
    one, two = vocab.encode_batch([text, text])
    assert isinstance(one, Encoded)
    assert isinstance(two, Encoded)
    assert_aligned(vocab, text, one)
    assert one.ids.tolist() == two.ids.tolist()
    assert len(one.ids) == len(byte_level().encode(text).ids)


def test_tokens_known_only_to_the_configuration(tmp_path: Path) -> None:
    declared = {"450": {"content": "<late>", "special": True}, "451": {"content": "late text", "special": False}}
    vocab = load_vocabulary(
        checkpoint(tmp_path, byte_level(), tokenizer_config={"eos_token": "<late>", "added_tokens_decoder": declared})
    )
    assert vocab.end_ids.tolist() == [450]
    assert vocab.token_bytes[450:] == [None, b"late text"]


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_vocabulary(tmp_path / "nowhere")
    with pytest.raises(InputError, match="materialise"):
        load_vocabulary("builtin:smollm2-135m-instruct")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_vocabulary(tmp_path)
