"""`check`, and the first second of every stage: what would stop a run is known before work begins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bytecache.pipeline.commands.check import check
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.run import run
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.context import Context, open_context
from bytecache.schemas.errors import BytecacheError, ConfigError, InputError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.corpus import files
from bytecache.stages.student.check import check_student, refuse_tied_targets
from tests.support.conversations import PLAIN
from tests.support.tiny_models import byte_level_tokenizer, make_checkpoint


def model(folder: Path, *, tied: bool = True, **files: object) -> Path:
    """A tiny checkpoint; `files`: JSON to put into it, by name without suffix."""
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
                    max_position_embeddings=256)
    ).save_pretrained(folder)  # fmt: skip
    byte_level_tokenizer(320).save(str(folder / "tokenizer.json"))
    given = {"tokenizer_config": {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": PLAIN}, **files}
    for name, content in given.items():
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() and name == "config" else {}
        path.write_text(content if isinstance(content, str) else json.dumps({**old, **content}))  # type: ignore[dict-item]
    return folder


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}}
NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
SAMPLING = {"do_sample": False, "temperature": 0.7, "top_p": 0.9}
STUDENTS: dict[str, tuple[Callable[[Path], Path], dict[str, object], str, type[BytecacheError]]] = {
    "gptq": (lambda p: model(p, config=GPTQ), {}, r"student\.model.*quantised \(gptq\)", InputError),
    "awq": (lambda p: model(p, config=AWQ), {}, r"quantised \(awq\)", InputError),
    "bitsandbytes": (lambda p: model(p, config=NF4), {}, r"quantised \(bitsandbytes\)", InputError),
    "older gptq": (lambda p: model(p, quantize_config={"bits": 4}), {}, "quantised", InputError),
    "generation": (lambda p: model(p, generation_config=SAMPLING), {}, r"generation_config\.json.*_sample", InputError),
    "broken generation": (lambda p: model(p, generation_config="{"), {}, r"generation_config\.json.*JSON", InputError),
    "broken tokenizer": (lambda p: model(p, tokenizer="{}"), {}, r"tokenizer\.json is not a tokenizer", InputError),
    "tied head": (model, {"lora_rank": 4, "lora_targets": "q_proj lm_head"}, r"lora_targets.*lm_head", ConfigError),
    "tied embedding": (model, {"lora_rank": 4, "lora_targets": "embed_tokens"}, "embed_tokens", ConfigError),
    "no such folder": (lambda p: p / "none", {}, r"student\.model.*no such folder", InputError),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS)
def test_students_that_could_not_be_trained_or_saved_are_refused_at_once(name: str, tmp_path: Path) -> None:
    make, train, words, kind = STUDENTS[name]
    folder = make(tmp_path / "student")
    with pytest.raises(kind, match=words):
        check_student(Student(model=str(folder)), Train.model_validate(train))


@pytest.mark.parametrize(("student", "train", "words"), [
    ({"tokenizer": "bpe:100"}, {}, "258"), ({"tokenizer": "bpe:x"}, {}, "bpe:N"),
    ({"hidden_size": 30, "heads": 4}, {}, "student.heads"),
    ({}, {"lora_rank": 2, "lora_targets": "lm_head"}, "lora_targets"),
])  # fmt: skip
def test_new_students_that_are_impossible_are_refused(student: dict, train: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_student(Student.model_validate(student), Train.model_validate(train))


def test_what_can_be_done_passes(tmp_path: Path) -> None:
    sampling = {**SAMPLING, "do_sample": True}
    tied = model(tmp_path / "tied", generation_config=sampling)
    untied = model(tmp_path / "untied", tied=False)
    check_student(Student(model=str(tied)), Train(lora_rank=2), chat=True)
    check_student(Student(model=str(tied)), Train(lora_rank=2, lora_targets="q_proj v_proj", lora_embeddings=True))
    check_student(Student(model=str(untied), tokenizer="bytes"), Train(lora_rank=2, lora_targets="lm_head"))
    check_student(Student(), Train())


def test_adapters_beside_a_tied_head_are_found_on_the_model_itself(tmp_path: Path) -> None:
    opened = LlamaForCausalLM.from_pretrained(model(tmp_path / "m"))
    with pytest.raises(ConfigError, match="one tensor"):
        refuse_tied_targets(opened, "q_proj head lm_head")
    refuse_tied_targets(opened, "all-linear")
    refuse_tied_targets(LlamaForCausalLM.from_pretrained(model(tmp_path / "u", tied=False)), "lm_head")


def context_of(tmp_path: Path, *overrides: str) -> tuple[Context, list[str]]:
    said: list[str] = []
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(9)))
    given = [f"run.dir={tmp_path / 'run'}", f"corpus.source={tmp_path / 'c.jsonl'}", "teacher.backend=hf"]
    return open_context(load_settings(None, [*given, *overrides]), said.append), said


def test_the_folder_of_a_corpus_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a million files: `check` and what `plan` says of it look at one list."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(20)))
    (folder / "notes.md").write_text("no text of the corpus")
    listed: list[Path] = []
    walk = files._walk
    monkeypatch.setattr(files, "_walk", lambda root: (listed.append(root), walk(root))[1])
    context, said = context_of(tmp_path, f"corpus.source={folder}", "teacher.model=none", "student.model=none")
    with pytest.raises(BytecacheError):
        check(context)
    assert "1 files of other kinds" in said[0] and listed == [folder]
    listed.clear()
    plan(context)
    assert any("notes.md" in line for line in said) and len(listed) == 2, "once to cut it, once to say what it was"


def test_check_says_all_that_is_wrong_and_begins_nothing(tmp_path: Path) -> None:
    teacher = make_checkpoint(tmp_path / "teacher")
    context, said = context_of(tmp_path, f"teacher.model={teacher}")
    check(context)
    assert len(said) == 3 and "c.jsonl can be read" in said[0] and "byte-level" in said[1]
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, **AWQ}))
    overrides = [f"teacher.model={teacher}", "student.tokenizer=bpe:3", f"corpus.source={tmp_path / 'none.txt'}"]
    context, said = context_of(tmp_path, *overrides)
    with pytest.raises(InputError, match=r"none\.txt"):
        check(context)
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == ["also", "also"]
    assert "awq" in said[0] and 'teacher.backend = "vllm"' in said[0] and "bpe:3" in said[1]
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.json"))


@pytest.mark.parametrize(("overrides", "words"), [
    (["train.lora_rank=2", "train.lora_targets=lm_head"], "lora_targets"), (["student.tokenizer=bpe:9"], "bpe:N"),
])  # fmt: skip
def test_run_refuses_before_the_teacher_has_been_paid_for(tmp_path: Path, overrides: list[str], words: str) -> None:
    teacher = make_checkpoint(tmp_path / "teacher")
    context, _ = context_of(tmp_path, f"teacher.model={teacher}", *overrides)
    with pytest.raises(ConfigError, match=words):
        run(context)
    assert not list(context.store.list("teacher"))


def test_a_quantised_teacher_under_transformers_is_a_refusal(tmp_path: Path) -> None:
    from bytecache.pipeline.commands.plan import plan
    from bytecache.pipeline.commands.teacher import teacher

    folder = make_checkpoint(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    for quantised in (GPTQ, AWQ, NF4):
        (folder / "config.json").write_text(json.dumps({**config, **quantised}))
        context, _ = context_of(tmp_path, f"teacher.model={folder}")
        plan(context)
        with pytest.raises(ConfigError, match=r"quantised.*teacher\.backend"):
            teacher(context)
