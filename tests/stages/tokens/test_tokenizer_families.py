"""Every family of teachers' tokenizers: any text is spelled exactly or set aside with a reason, never silently wrong.

Small tokenizers of every family (families.py); real ones from installed packages, from the fixture folder where it
exists, and from any folders that BYTECACHE_TOKENIZERS names (separated like PATH).
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary, load_vocabulary
from tests.support.families import FAMILIES, FRAGMENTS, TEXT
from tests.support.places import FIXTURES

LIGHT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONE_SURROGATE = "a\ud800"
KNOWN_REASONS = {"missing-byte", "unk", "mismatch", "normalised", "control token", "lone surrogate", "beyond the head"}


def check(vocab: Vocabulary, text: str, result: Encoded | Misfit) -> str:
    """The reason why a text was set aside, "" where it was spelled; fails where it was spelled otherwise."""
    if isinstance(result, Misfit):
        assert result.reason in KNOWN_REASONS
        return result.reason
    pieces = [vocab.token_bytes[i] for i in result.ids.tolist()]
    assert all(pieces), "a token of text carries no bytes"
    assert b"".join(p or b"" for p in pieces) == result.data == b" " * result.synthetic + text.encode()
    assert result.starts.tolist() == np.cumsum([0, *(len(p or b"") for p in pieces)]).tolist()
    return ""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    made: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in made:
            if name.endswith("_ranks") or name == "tekken":
                pytest.importorskip("tiktoken")
            folder = tmp_path_factory.mktemp("family") / name
            FAMILIES[name].write(folder)
            made[name] = load_vocabulary(folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
@LIGHT
@given(texts=st.lists(TEXT, max_size=4))
def test_any_text_is_exact_or_set_aside(vocabulary, name, texts):
    vocab = vocabulary(name)
    for text, result in zip(texts, vocab.encode_batch(texts), strict=True):
        reason = check(vocab, text, result)
        assert not reason or reason in FAMILIES[name].aside


@pytest.mark.parametrize("name", FAMILIES)
def test_start_and_ends(vocabulary, name):
    vocab, family = vocabulary(name), FAMILIES[name]

    def id_of(token: str | int) -> int:
        return token if isinstance(token, int) else vocab.token_id(token)

    assert vocab.start_id == id_of(family.start)
    assert vocab.end_ids.tolist() == sorted(id_of(end) for end in family.ends)
    assert all(vocab.token_bytes[i] is None for i in (vocab.start_id, *vocab.end_ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_text_are_text(vocabulary, name):
    """Whatever the tokenizer calls its control tokens, a document that says so is cut like any other."""
    vocab = vocabulary(name)
    for control in vocab.control_names:
        for text in (control, f"a {control}the", f"{control}{control} "):
            (result,) = vocab.encode_batch([text])
            reason = check(vocab, text, result)
            assert not reason or reason in FAMILIES[name].aside


@pytest.mark.parametrize("name", FAMILIES)
def test_a_broken_text_spares_its_neighbours(vocabulary, name):
    vocab = vocabulary(name)
    before, broken, after = vocab.encode_batch(["the", LONE_SURROGATE, "the"])
    assert isinstance(broken, Misfit) and broken.reason == "lone surrogate"
    assert isinstance(before, Encoded) and isinstance(after, Encoded)
    assert before.ids.tolist() == after.ids.tolist()


def test_normalised_text_is_realigned_with_its_own_bytes(vocabulary):
    """NFC would merge or reorder these; the tokens spell the text as it came."""
    for name in ("qwen", "neox"):
        for text in ("e\u0301", "\u0644\u0651\u064e\u0647", "\u1100\u1161", "\u212b \u2126"):
            encoded = vocabulary(name).encode(text)
            assert encoded.data == text.encode()


def test_the_space_mark_is_spelled_by_bytes(vocabulary):
    """SentencePiece reads U+2581 as a space; a document that holds one is not lost for it."""
    for name in ("llama2", "mistral", "gemma", "unigram"):
        vocab = vocabulary(name)
        encoded = vocab.encode("\u2581a \u2581\u2581b")
        assert encoded.data == b" " * encoded.synthetic + "\u2581a \u2581\u2581b".encode()
        assert [vocab.token_bytes[i] for i in encoded.ids].count(b"\x96") == 3


def test_a_token_of_1024_bytes_and_several_ids_of_the_same_bytes(vocabulary):
    vocab = vocabulary("neox")
    encoded = vocab.encode("a" + " " * 1024 + "b")
    assert int(np.diff(encoded.starts).max()) == 1024
    assert vocab.describe()["longest_token"] == 1024
    doubled = vocabulary("llama2")
    ids = [i for i, data in enumerate(doubled.token_bytes) if data == b"a"]
    assert len(ids) == 2
    node = doubled.trie.first_child[0] + int(np.searchsorted(doubled.trie.byte[1:257], ord("a")))
    assert doubled.trie.n_equal[node] == 2, "both ids are in the same range: neither's mass is lost"


def test_holes_and_padded_rows_carry_no_bytes(vocabulary, tmp_path):
    (tmp_path / "rwkv_vocab_v1.txt").write_text("1 'a' 1\n5 'b' 1\n")
    sparse = load_vocabulary(tmp_path, lm_head_rows=9)
    assert sparse.token_bytes == [None, b"a", None, None, None, b"b", None, None, None]
    padded = vocabulary("qwen")
    assert padded.token_bytes[-64:] == [None] * 64
    assert not set(range(padded.size - 64, padded.size)) & set(padded.order.tolist())


# --- real files -------------------------------------------------------------------------------------------------------

TOKENIZERS = FIXTURES / "tokenizers"
LOSSY = {"bert_base_cased", "clip", "gte_bert_uncased", "t5_small", "xlmr_e5", "xlnet_base_cased"}
ENCODER_ONLY = {"modernbert": {"start": "[CLS]", "end": "[SEP]"}}
QUICK = {"gpt2", "stories_tok512"}


def real_tokenizers() -> dict[str, Path]:
    found: dict[str, Path] = {}
    if TOKENIZERS.is_dir():
        found = {p.name: p for p in TOKENIZERS.iterdir() if p.is_dir() and p.name not in LOSSY | {"LICENSES"}}
    if (spec := find_spec("mistral_common")) and spec.origin and find_spec("tiktoken"):
        found |= {p.stem: p for p in Path(spec.origin).parent.glob("data/tekken_*.json")}
    for name in filter(None, os.environ.get("BYTECACHE_TOKENIZERS", "").split(os.pathsep)):
        found[name] = Path(name)
    return found


REAL = real_tokenizers()


@pytest.fixture(scope="module")
def real():
    made: dict[str, Vocabulary] = {}

    def get(name: str) -> Vocabulary:
        if name not in made:
            made.clear()  # a quarter of a million tokens each
            made[name] = load_vocabulary(REAL[name], **ENCODER_ONLY.get(name, {}))
        return made[name]

    return get


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(REAL)])
def test_real_tokenizers_are_never_silently_wrong(real, name):
    vocab = real(name)
    aside: set[str] = set()

    @settings(max_examples=40, deadline=None, database=None)
    @given(texts=st.lists(TEXT, max_size=8))
    def spell(texts):
        for text, result in zip(texts, vocab.encode_batch(texts), strict=True):
            aside.add(check(vocab, text, result))

    spell()
    for text, result in zip(FRAGMENTS, vocab.encode_batch(FRAGMENTS), strict=True):
        aside.add(check(vocab, text, result))
    assert aside <= ({"", "missing-byte"} if vocab.missing_bytes else {""})
    for control in vocab.control_names:
        assert check(vocab, control, vocab.encode_batch([control])[0]) in aside


@pytest.mark.slow
def test_a_folder_with_only_a_sentencepiece_model(tmp_path):
    """Early checkpoints have tokenizer.model alone; transformers turns it into a fast tokenizer."""
    spec = find_spec("mistral_common")
    file = Path(spec.origin).parent / "data" / "tokenizer.model.v1" if spec and spec.origin else None
    if file is None or not file.is_file():
        pytest.skip("no package here carries a SentencePiece model")
    (tmp_path / "tokenizer.model").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}')
    vocab = load_vocabulary(tmp_path)
    assert (vocab.size, vocab.start_id, vocab.end_ids.tolist(), vocab.missing_bytes) == (32_000, 1, [2], [])
    for text, result in zip(FRAGMENTS, vocab.encode_batch(FRAGMENTS), strict=True):
        assert check(vocab, text, result) == ""


@pytest.mark.slow
def test_a_lone_sentencepiece_file_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model.v1").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_vocabulary(tmp_path / "tokenizer.model.v1")
