"""A student's tokenizer is the original to the byte, in the student's folder and in the export, whatever its class."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.settings import Student, Train
from bytecache.stages import export
from bytecache.stages.models.ordinary import with_older_names
from bytecache.stages.student import student, tokenizer_files
from bytecache.stages.student.tokenizer_files import AWKWARD
from bytecache.stages.tokens import library
from bytecache.stages.tokens.guard import Guard, Limits, UnopenedError
from bytecache.stages.tokens.library import differences
from bytecache.stages.train.train import train
from tests.support.places import FIXTURES
from tests.support.student_data import make_dataset
from tests.support.tiny_models import byte_level_tokenizer, sentencepiece_tokenizer

BEGIN_END = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def checkpoint(folder: Path, tokenizer: Tokenizer, config: dict, model_type: type = LlamaConfig) -> Path:
    """A tiny student with this tokenizer under this configuration."""
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    shape = {
        "vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id("<|begin|>"), "eos_token_id": tokenizer.token_to_id("<|end|>"),
    }  # fmt: skip
    if model_type is LlamaConfig:
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    else:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_config(model_type(**shape)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**BEGIN_END, **config}))
    return folder


def digit_splitting() -> Tokenizer:
    """A byte-level tokenizer with another regex than its class would give it, and no prefix space."""
    tokenizer = byte_level_tokenizer(330)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def composed() -> Tokenizer:
    tokenizer = byte_level_tokenizer(330)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


CASES = {
    "byte-level called Llama": (byte_level_tokenizer, {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "digits called GPT-2": (digit_splitting, {"tokenizer_class": "GPT2Tokenizer"}),
    "NFC called Qwen": (composed, {"tokenizer_class": "Qwen2TokenizerFast"}),
    "SentencePiece called GPT-2": (sentencepiece_tokenizer, {"tokenizer_class": "GPT2TokenizerFast"}),
    "a class of remote code": (
        byte_level_tokenizer, {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["m.M", None]}}
    ),
    "a list of version 5": (
        byte_level_tokenizer, {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|begin|>"]}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("targets") / "targets")


def assert_same(folder: Path, original: Path, opener: type = AutoTokenizer) -> None:
    assert (folder / "tokenizer.json").read_bytes() == original.read_bytes()
    library, opened = Tokenizer.from_file(str(original)), opener.from_pretrained(folder)
    for text in AWKWARD:
        ids = library.encode(text, add_special_tokens=False).ids
        assert opened(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert opened.decode(ids) == library.decode(ids, skip_special_tokens=False), repr(text)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use", ["model", "tokenizer"])
def test_the_original_is_kept_whatever_its_configuration_calls_it(
    name: str, use: str, tmp_path: Path, targets: Path
) -> None:
    make, config = CASES[name]
    tokenizer = make(320) if make is byte_level_tokenizer else make()
    source = checkpoint(tmp_path / "source", tokenizer, config)
    settings = Student(**{use: str(source)}, hidden_size=16, layers=1, heads=2)
    info = student.prepare(settings, targets, tmp_path / "student", seed=0)
    assert_same(tmp_path / "student", source / "tokenizer.json")
    kept = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in kept
    assert {key: kept[key] for key in BEGIN_END} == BEGIN_END
    assert bool(info["notes"]) == bool(config.get("add_bos_token"))
    opened = student.load(tmp_path / "student")
    spelled = opened.vocabulary.encode("Hello world, how are you?")
    assert opened.tokenizer.decode(spelled.ids) in ("Hello world, how are you?", " Hello world, how are you?")


def test_an_export_is_what_was_trained_to_the_byte(tmp_path: Path, targets: Path) -> None:
    source = checkpoint(tmp_path / "source", byte_level_tokenizer(320), {"tokenizer_class": "LlamaTokenizerFast"})
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    student.prepare(Student(model=str(source)), targets, tmp_path / "student", seed=0)
    settings = Train(steps=2, batch=2, window_bytes=300, warmup=1, tensorboard=False)
    done = train(settings, tmp_path / "student", targets, tmp_path / "run", name="kept", device="cpu")
    assert done["terms"]["loss"] > 0
    assert Path(done["checkpoint"]).stat().st_mode & 0o777 == 0o644
    export.export(tmp_path / "student", Path(done["checkpoint"]), tmp_path / "plain")
    assert_same(tmp_path / "plain", source / "tokenizer.json")
    assert_same(tmp_path / "plain", source / "tokenizer.json", PreTrainedTokenizerFast)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template == (source / "chat_template.jinja").read_text()
    )
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    for file in (tmp_path / "plain").rglob("*"):
        assert file.stat().st_mode == ordinary.stat().st_mode, file
    GenerationConfig.from_pretrained(tmp_path / "plain")


def test_an_architecture_whose_tokenizer_is_forced_gets_its_own(tmp_path: Path, targets: Path) -> None:
    """transformers 5 opens any tokenizer beside a Qwen2 model as Qwen2's; a student keeps what it was trained with."""
    from transformers import Qwen2Config

    source = checkpoint(tmp_path / "source", digit_splitting(), {}, Qwen2Config)
    original = source / "tokenizer.json"
    assert differences(AutoTokenizer.from_pretrained(source), original, AWKWARD)
    info = student.prepare(Student(model=str(source)), targets, tmp_path / "student", seed=0)
    assert info["notes"] == []
    assert_same(tmp_path / "student", original)
    assert_same(tmp_path / "student", original, PreTrainedTokenizerFast)
    assert student.load(tmp_path / "student").vocabulary.encode("a1b22").ids.size


def test_a_tokenizer_that_nobody_would_open_as_it_stands_is_refused(
    tmp_path: Path, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2Config

    monkeypatch.setattr(tokenizer_files, "AS_IT_STANDS", {})  # as if transformers no longer looked at it
    source = checkpoint(tmp_path / "source", digit_splitting(), {}, Qwen2Config)
    with pytest.raises(InputError, match="AutoTokenizer builds a tokenizer of its own, which cuts"):
        student.prepare(Student(model=str(source)), targets, tmp_path / "student", seed=0)
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_without_a_tokenizer_json_a_conversion_must_cut_alike(tmp_path: Path, targets: Path) -> None:
    """vocab.json and merges.txt convert exactly; a SentencePiece model does not."""
    source = checkpoint(tmp_path / "source", byte_level_tokenizer(320), {"tokenizer_class": "GPT2Tokenizer"})
    spec = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]]
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    original = tmp_path / "original.json"
    shutil.move(source / "tokenizer.json", original)
    student.prepare(Student(model=str(source)), targets, tmp_path / "student", seed=0)
    library, opened = Tokenizer.from_file(str(original)), AutoTokenizer.from_pretrained(tmp_path / "student")
    for text in AWKWARD:
        if "<" not in text:
            assert opened(text)["input_ids"] == library.encode(text).ids
    (source / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        student.prepare(Student(model=str(source)), targets, tmp_path / "none", seed=0)
    pytest.importorskip("sentencepiece")
    from tests.stages.tokens.test_sentencepiece import FAITHFUL
    from tests.stages.tokens.test_sentencepiece import train as train_sentencepiece

    (source / "tokenizer.model").write_bytes(train_sentencepiece(**FAITHFUL))
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"otherwise than they do.*add the model's own tokenizer\.json"):
        student.prepare(Student(tokenizer=str(source)), targets, tmp_path / "none", seed=0)


def test_a_tokenizer_that_ends_nothing_or_spells_nothing_is_refused_as_a_student(tmp_path: Path, targets: Path) -> None:
    source = checkpoint(tmp_path / "source", byte_level_tokenizer(320), {})
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"eos_token in its tokenizer_config\.json"):
        student.prepare(Student(tokenizer=str(source)), targets, tmp_path / "student", seed=0)
    lossy = byte_level_tokenizer(320)
    lossy.normalizer = normalizers.Lowercase()
    lossy.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(BEGIN_END))
    with pytest.raises(InputError, match="use a student with a byte-level"):
        student.prepare(Student(tokenizer=str(source)), targets, tmp_path / "student", seed=0)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json|cannot be opened"):
        student.prepare(Student(tokenizer=str(source)), targets, tmp_path / "student", seed=0)


def test_start_and_end_that_only_the_class_names_are_kept(tmp_path: Path, targets: Path) -> None:
    """Llama's class calls them <s> and </s> where its configuration does not."""
    spec = json.loads(byte_level_tokenizer(320).to_str().replace("<|begin|>", "<s>").replace("<|end|>", "</s>"))
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    source = tmp_path / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    LlamaConfig(vocab_size=320).save_pretrained(source)
    settings = Student(tokenizer=str(source), hidden_size=16, layers=1, heads=2)
    student.prepare(settings, targets, tmp_path / "student", seed=0)
    opened = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert (opened.bos_token, opened.eos_token) == ("<s>", "</s>")
    assert_same(tmp_path / "student", source / "tokenizer.json")


def test_older_names_say_the_same() -> None:
    """What transformers 4 reads, beside what version 5 writes; written out by hand."""
    plain = {"dtype": "float32", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert with_older_names(plain) == {**plain, "torch_dtype": "float32", "rope_theta": 5e5}
    scaled = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "partial_rotary_factor": 0.5}
    older = with_older_names({"text_config": {"rope_parameters": scaled}})["text_config"]
    assert (older["rope_theta"], older["partial_rotary_factor"]) == (1e4, 0.5)
    assert older["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    neox = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.5}}
    assert with_older_names(neox) | {"rotary_pct": 0.5, "rotary_emb_base": 2e4} == with_older_names(neox)
    layers = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    older = with_older_names({"rope_parameters": layers})
    assert (older["rope_theta"], older["rope_local_base_freq"]) == (1e6, 1e4) and "rope_scaling" not in older


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["deepseek_v3", "smollm2", "qwen3", "mistral_v1", "gpt_neox"])
def test_real_tokenizers_where_fixtures_lie_beside_the_checkout(name: str, tmp_path: Path, targets: Path) -> None:
    folder = FIXTURES / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    source = tmp_path / "source"
    shutil.copytree(folder, source, copy_function=shutil.copyfile)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    settings = Student(tokenizer=str(source), hidden_size=8, layers=1, heads=2)
    student.prepare(settings, targets, tmp_path / "student", seed=0)
    assert_same(tmp_path / "student", folder / "tokenizer.json")


def test_a_normaliser_that_blows_text_up_is_refused_before_anything_is_cut(tmp_path: Path, targets: Path) -> None:
    tokenizer = byte_level_tokenizer(320)
    tokenizer.normalizer = normalizers.Replace("e", "e" * 100_000)
    source = checkpoint(tmp_path / "source", tokenizer, {})
    with pytest.raises(InputError, match="long text of every letter"):
        student.prepare(Student(model=str(source)), targets, tmp_path / "student", seed=0)


@pytest.mark.slow
def test_what_a_class_makes_of_a_folder_is_bounded(
    tmp_path: Path, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regular expression that nobody knows is compared in a child, whose end is a reason and not ours."""
    tokenizer = byte_level_tokenizer(320)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(?:(?:a|b|[a-z ])*)*z|x"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    source = checkpoint(tmp_path / "source", tokenizer, {})
    assert not library.is_contained(source)
    monkeypatch.setattr(library, "Here", None)  # not in this process
    asked = []
    call = Guard.call
    monkeypatch.setattr(Guard, "call", lambda *given: (asked.append(given[1]["work"]), call(*given))[1])
    with library.opened(source, "x") as opened:
        assert opened.differences(["a", "12"], auto=False) == ""
        assert opened.facts().names["bos_token"] == "<|begin|>"
    assert asked == ["differences", "facts"]
    monkeypatch.setattr(library, "OPENING", Limits(0.0, 1 << 30))
    with pytest.raises(UnopenedError, match="too slow"), library.opened(source, "x") as opened:
        opened.differences(["a" * 30 + " b" * 30 + "!"] * 50, auto=False)


def test_a_folder_with_other_vocabularies_is_not_opened_here(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", byte_level_tokenizer(320), {})
    assert library.is_contained(source)
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "x.tiktoken", "tekken.json", "code.py"):
        (source / name).write_text("{}")
        assert not library.is_contained(source), name
        (source / name).unlink()
    (source / "tokenizer.json").unlink()
    assert not library.is_contained(source)
