"""Vocabularies that are no tokenizer.json: rank files, Tekken, RWKV, written here in miniature."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary

MERGED = [b"he", b"th", b"the", b" t", b" the", b"\xe4\xbd"]
PIECES = [*(bytes([b]) for b in range(256)), *MERGED]
TEXTS = ["", "the the", "\u4f60 <|endoftext|> </s>", " a\x00", "\ufb01cafe\u0301"]


def assert_spells(vocab: Vocabulary, texts: list[str] = TEXTS) -> None:
    for text, encoded in zip(texts, vocab.encode_batch(texts), strict=True):
        assert isinstance(encoded, Encoded), f"{text!r}: {encoded}"
        assert encoded.synthetic == 0
        assert b"".join(vocab.token_bytes[i] or b"" for i in encoded.ids.tolist()) == text.encode()
        assert not set(encoded.ids.tolist()) & {vocab.start_id, *vocab.end_ids.tolist()}


def test_rank_file(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    rows = b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(PIECES))
    (tmp_path / "cl100k_base.tiktoken").write_bytes(rows)
    vocab = load_vocabulary(tmp_path)
    assert vocab.token_bytes[: len(PIECES)] == PIECES
    assert vocab.token_bytes[len(PIECES) :] == [None] * (100277 - len(PIECES))
    assert vocab.start_id == vocab.end_ids[0] == 100257
    assert_spells(vocab)
    assert vocab.encode(" the").ids.tolist() == [PIECES.index(b" the")]
    (tmp_path / "cl100k_base.tiktoken").rename(tmp_path / "mine.tiktoken")
    with pytest.raises(InputError, match=r"mine\.tiktoken.*tokenizer\.json"):
        load_vocabulary(tmp_path)


def test_damaged_rank_file(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\nIg==")
    with pytest.raises(InputError, match="line 2"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_tekken_counts_ranks_after_its_special_tokens(tmp_path: Path, listed: bool) -> None:
    pytest.importorskip("tiktoken")
    vocab_rows = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate([*PIECES, b"dead one", b"dead two"])
    ]
    config = {
        "pattern": r"\s?\p{L}+|\s+|[^\s\p{L}]+",
        "default_num_special_tokens": 10,
        "default_vocab_size": len(PIECES) + 10,
    }
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    content = {"config": config, "vocab": vocab_rows} | ({"special_tokens": special} if listed else {})
    (tmp_path / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    vocab = load_vocabulary(tmp_path)
    assert vocab.token_bytes == [None] * 10 + PIECES
    assert (vocab.start_id, vocab.end_ids.tolist()) == (1, [2])
    assert_spells(vocab)
    assert vocab.encode(" the").ids.tolist() == [10 + PIECES.index(b" the")]
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match="no Tekken vocabulary"):
        load_vocabulary(tmp_path)


def test_rwkv_takes_the_longest_token(tmp_path: Path) -> None:
    rows = [f"{i} {piece!r} {len(piece)}" for i, piece in enumerate(PIECES, 1)]
    rows[1 + ord("a") - 1] = f"{1 + ord('a')} 'a' 1"
    path = tmp_path / "rwkv_vocab_v1.txt"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    vocab = load_vocabulary(tmp_path)
    assert vocab.token_bytes == [None, *PIECES]
    assert (vocab.start_id, vocab.end_ids.tolist()) == (0, [0])
    assert_spells(vocab)
    assert vocab.encode("the he").ids.tolist() == [1 + PIECES.index(t) for t in (b"the", b" ", b"he")]
    path.write_text("1 'ab' 3\n")
    with pytest.raises(InputError, match=r"line 1.*2 bytes, not 3"):
        load_vocabulary(path)


def test_rwkv_looks_at_every_byte_a_limited_number_of_times(tmp_path: Path) -> None:
    """A token that almost matches at every byte of a text makes greedy matching quadratic."""
    (tmp_path / "rwkv_vocab_v1.txt").write_text(f"1 'a' 1\n2 {'a' * 5000 + 'b'!r} 5001\n3 'c' 1\n")
    vocab = load_vocabulary(tmp_path)
    found = vocab.encode_batch(["ac", "a" * 20_000, "a" * 5000 + "b"])
    assert [isinstance(one, Encoded) for one in found] == [True, False, True]
    assert isinstance(found[1], Misfit) and found[1].reason == "tokenizer: too slow"


@pytest.mark.parametrize(
    "literal", ["9" * 11, "(" * 300 + ")" * 300, "-" * 9000 + "1", "[1, 2]", "None", "'\\ud800'"], ids=len
)
def test_rwkv_rows_that_are_no_text(tmp_path: Path, literal: str) -> None:
    (tmp_path / "rwkv_vocab_v1.txt").write_text(f"1 'a' 1\n2 {literal} 2\n")
    with pytest.raises(InputError, match="line 2"):
        load_vocabulary(tmp_path)


def test_sentencepiece_models_agree_with_sentencepiece() -> None:
    """The pieces as Google's own library reads them are an independent source for the table."""
    mistral_common = pytest.importorskip("mistral_common")
    sentencepiece = pytest.importorskip("sentencepiece")
    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if not file.is_file():
        pytest.skip("this mistral_common carries no SentencePiece model")
    reader = sentencepiece.SentencePieceProcessor(model_file=str(file))
    expected: list[bytes | None] = []
    for i in range(reader.get_piece_size()):
        piece = reader.id_to_piece(i)
        if reader.is_control(i) or reader.is_unknown(i) or reader.is_unused(i):
            expected.append(None)
        elif reader.is_byte(i):
            expected.append(bytes([int(piece[3:-1], 16)]))
        else:
            expected.append(piece.replace("\u2581", " ").encode())
    from bytecache.stages.tokens.token_bytes import table_from_json

    # The JSON that converters write for such a model, made here from the library's own reading.
    spec = {
        "model": {
            "type": "BPE",
            "vocab": {reader.id_to_piece(i): i for i in range(reader.get_piece_size())},
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
        "added_tokens": [
            {"id": i, "content": reader.id_to_piece(i), "special": True}
            for i in range(reader.get_piece_size())
            if reader.is_control(i)
        ],
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
    table = table_from_json(spec, "tokenizer.model.v1")
    assert table.token_bytes == expected
    assert table.unknown == {reader.unk_id()}


def test_a_file_may_be_named_directly(tmp_path: Path) -> None:
    path = tmp_path / "rwkv_vocab_v2.txt"
    path.write_text("1 'a' 1\n2 b'\\xff' 1\n4 'ab' 2\n")
    (tmp_path / "rwkv_vocab_v1.txt").write_text("1 'z' 1\n")
    vocab = load_vocabulary(path, lm_head_rows=8)
    assert vocab.token_bytes == [None, b"a", b"\xff", None, b"ab", None, None, None]
    assert vocab.order.tolist() == [1, 4, 2]
    assert np.array_equal(vocab.encode("aba").ids, [4, 1])
