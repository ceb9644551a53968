"""The vocabulary on real tokenizers, where the fixture folder exists: every awkward string, every refusal."""

import json
from collections.abc import Iterable

import pytest
from _pytest.mark.structures import ParameterSet
from tokenizers import Tokenizer

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.vocab import Encoded, Misfit, load_vocabulary
from tests.support.places import FIXTURES

TOKENIZERS = FIXTURES / "tokenizers"
pytestmark = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no fixture tokenizers here")

# Name: (size, ordinary, start, ends, strings set aside by reason).
EXACT = {
    "cl100k_base": (100277, 100256, 100257, [100257], {}),
    "deepseek_v3": (128815, 128011, 0, [1], {}),
    "gpt2": (50257, 50256, 50256, [50256], {}),
    "gpt_neox": (50277, 50275, 0, [0], {}),
    "mistral_v1": (32000, 31997, 1, [2], {}),
    "mistral_v3": (32768, 31997, 1, [2], {}),
    "phi2": (50295, 50294, 50256, [50256], {}),
    "qwen3": (151669, 151655, 151645, [151645], {}),
    "qwen_tiktoken": (151851, 151643, 151643, [151643], {}),
    "roberta_base": (50265, 50260, 0, [2], {}),
    "rwkv_world": (65530, 65529, 0, [0], {}),
    "smollm2": (49152, 49135, 1, [2], {"missing-byte": 9}),
    "stories_tok512": (512, 509, 1, [2], {}),
    "whisper_tiny": (51865, 51757, 50257, [50257], {}),
}
REFUSED = {
    "bert_base_cased": "WordPiece",
    "clip": "</w>",
    "gte_bert_uncased": "WordPiece",
    "t5_small": "Precompiled",
    "xlmr_e5": "Precompiled",
    "xlnet_base_cased": "normaliser",
}


# One of each family is quick; the others load 50k-250k tokens each.
QUICK = {"gpt2", "mistral_v1", "smollm2", "stories_tok512", "rwkv_world", "bert_base_cased", "clip", "t5_small"}


def _each(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(names)]


@pytest.mark.parametrize("name", _each(EXACT))
def test_real_tokenizers_spell_awkward_strings(name: str) -> None:
    texts = json.loads((FIXTURES / "strings.json").read_text(encoding="utf-8"))["strings"]
    size, ordinary, start, ends, misfits = EXACT[name]
    vocab = load_vocabulary(TOKENIZERS / name)
    assert (vocab.size, len(vocab.order), vocab.start_id, vocab.end_ids.tolist()) == (size, ordinary, start, ends)
    seen: dict[str, int] = {}
    for text, result in zip(texts, vocab.encode_batch(texts), strict=True):
        if isinstance(result, Misfit):
            reason = result.reason
            seen[reason] = seen.get(reason, 0) + 1
            continue
        assert result.data == b" " * result.synthetic + text.encode()
        pieces = [vocab.token_bytes[i] for i in result.ids.tolist()]
        assert all(pieces)
        assert b"".join(p or b"" for p in pieces) == result.data
        assert result.starts[-1] == len(result.data)
    assert seen == misfits


@pytest.mark.parametrize("name", _each(REFUSED))
def test_lossy_tokenizers_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        load_vocabulary(TOKENIZERS / name, start="auto", end="auto")


@pytest.mark.parametrize("name", _each(["gpt2", "mistral_v1", "qwen3"]))
def test_canonical_tokens_are_the_librarys_own(name: str) -> None:
    """Sealing control tokens must change nothing about ordinary text."""
    text = (FIXTURES / "corpora" / "wiki_vital_en.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer = Tokenizer.from_file(str(TOKENIZERS / name / "tokenizer.json"))
    encoded = load_vocabulary(TOKENIZERS / name).encode(text)
    assert isinstance(encoded, Encoded)
    assert encoded.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modernbert", "deepseek_v3", "whisper_tiny"])
def test_added_tokens_keep_their_ids(name: str) -> None:
    """Rewriting the flags of added tokens must not renumber them: each non-special one encodes to itself."""
    tokenizer = Tokenizer.from_file(str(TOKENIZERS / name / "tokenizer.json"))
    start = {"modernbert": "[CLS]"}.get(name, "auto")
    vocab = load_vocabulary(TOKENIZERS / name, start=start, end={"modernbert": "[SEP]"}.get(name, "auto"))
    plain = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if not token.special}
    assert plain
    for i, token in plain.items():
        if vocab.token_bytes[i] is not None:
            assert vocab.token_bytes[i] == token.content.encode()
            assert vocab.encode(token.content).ids.tolist() == [i]


def test_small_real_model_names_its_own_start() -> None:
    vocab = load_vocabulary(FIXTURES / "models" / "stories260K")
    assert (vocab.size, vocab.start_id, vocab.end_ids.tolist()) == (512, 1, [2])
