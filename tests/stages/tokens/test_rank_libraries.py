"""Files of ranks against the libraries they were made for: mistral-common's Tekken, OpenAI's encodings in tiktoken."""

import base64
import json
import random
from pathlib import Path

import pytest

from bytecache.stages.tokens.vocab import Encoded, load_vocabulary
from tests.support.places import FIXTURES

tiktoken = pytest.importorskip("tiktoken")
LETTERS = "aZ\u00e9\u0416\u65e5\u0301\u01c5\u00b2 \t\n\r0١9'’.,!#_/-\U0001f600\u00a0"
WORDS = ["I'll", "DON'T", "we've", "x = 1_000", "    if x:\n", "</s>", "<|endoftext|>", "Ǆungla", "hasAB", "ABCdef"]


def texts(seed: int = 0) -> list[str]:
    """Random mixtures of what pre-tokenisers tell apart."""
    draw = random.Random(seed)
    mixed = ["".join(draw.choices(LETTERS, k=draw.randint(1, 24))) for _ in range(300)]
    return mixed + WORDS + [a + draw.choice(["", " ", "\n", "  "]) + b for a in WORDS for b in WORDS]


def pieces(pattern: str, seed: int = 1) -> dict[bytes, int]:
    """Ranks of all bytes and of whatever random merges of the text's own pieces yield."""
    draw = random.Random(seed)
    found: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=dict(found), special_tokens={})
    for text in texts(7):
        raw = text.encode()
        at = draw.randrange(len(raw))
        for size in (2, 3, 4, 6):
            # A token must be reachable by merges, so each of its prefixes is one as well.
            found.setdefault(raw[at : at + size], len(found))
    assert encoding.n_vocab == 256
    return found


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_texts_are_cut_as_tiktoken_cuts_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own pattern and control tokens, with ranks of ours, since its own are fetched from the network."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    published = getattr(openai_public, name)()
    ranks = pieces(published["pat_str"])
    lines = b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())
    (tmp_path / f"{name}.tiktoken").write_bytes(lines)
    vocabulary = load_vocabulary(tmp_path)
    library = tiktoken.Encoding(name, pat_str=published["pat_str"], mergeable_ranks=ranks, special_tokens={})
    for text, encoded in zip(texts(), vocabulary.encode_batch(texts()), strict=True):
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == library.encode_ordinary(text), repr(text)
    assert vocabulary.control_names == published["special_tokens"]


def tekken(folder: Path) -> Path:
    """A small Tekken file of the present version."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ranks = pieces(pattern)
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for piece, rank in ranks.items()
    ]
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    special += [{"rank": i, "token_str": f"<SPECIAL_{i}>", "is_control": True} for i in range(3, 20)]
    config = {
        "pattern": pattern, "num_vocab_tokens": len(rows), "default_vocab_size": len(rows) + 20 - 5,
        "default_num_special_tokens": 20, "version": "v3",
    }  # fmt: skip
    file = folder / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": rows, "special_tokens": special}))
    return file


@pytest.mark.slow
def test_texts_are_cut_as_mistral_common_cuts_them(tmp_path: Path) -> None:
    common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    carried = sorted((Path(common.__file__).parent / "data").glob("tekken*.json"))
    for file in [tekken(tmp_path), *carried]:
        vocabulary, library = load_vocabulary(file), Tekkenizer.from_file(file)
        for text, encoded in zip(texts(), vocabulary.encode_batch(texts()), strict=True):
            assert isinstance(encoded, Encoded)
            assert encoded.ids.tolist() == library.encode(text, bos=False, eos=False), repr(text)
        assert (vocabulary.start_id, vocabulary.end_ids.tolist()) == (library.bos_id, [library.eos_id])
        assert vocabulary.size == library.n_words


def test_real_ranks_where_fixtures_lie_beside_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    file = FIXTURES / "tokenizers" / "cl100k_base" / "cl100k_base.tiktoken"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: load_tiktoken_bpe(str(file)))
    library = tiktoken.Encoding(**openai_public.cl100k_base())
    vocabulary = load_vocabulary(file)
    for text, encoded in zip(texts(), vocabulary.encode_batch(texts()), strict=True):
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == library.encode_ordinary(text), repr(text)
