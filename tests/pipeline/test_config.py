"""Configuration: the shipped file is complete, and every mistake is refused in one useful line."""

import os
import re
import threading
import tomllib
from pathlib import Path

import pytest

from bytecache.pipeline import config
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.config_text import render_template, sections, toml_value
from bytecache.pipeline.launch.command import overrides
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import TRANSFER, TRANSFER_STUDENT, Settings, Student, Train
from tests.support.places import ROOT

SHIPPED = ROOT / "pipeline.toml"


def refusal(tmp_path: Path, toml: str, *overrides: str) -> str:
    path = tmp_path / "pipeline.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_configuration_may_come_through_a_pipe_but_is_not_awaited_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("[run]\nseed = 7\n"))
    writer.start()
    assert load_settings(path, []).run.seed == 7
    writer.join()
    monkeypatch.setattr(config, "PIPE_S", 0.01)
    with pytest.raises(ConfigError, match="is a pipe that nothing came through in"):
        load_settings(path, [])


def test_shipped_file_is_the_rendered_defaults() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == render_template(Settings()), (
        "run: bytecache config --defaults > pipeline.toml"
    )


def test_shipped_file_has_every_key_with_its_default_and_documentation() -> None:
    raw = SHIPPED.read_text(encoding="utf-8")
    written, meant = tomllib.loads(raw), Settings().model_dump()
    by_student = {key: meant["train"].pop(key) for key in TRANSFER}
    student = {key: meant["student"].pop(key) for key in TRANSFER_STUDENT}
    assert written == meant
    for key, value in (by_student | student).items():
        assert re.search(rf"^# {key} = {re.escape(toml_value(value))}$", raw, re.M), "as a comment, to be uncommented"
    assert (by_student, student) == (TRANSFER, TRANSFER_STUDENT)
    words = " ".join(line.removeprefix("# ") for line in raw.splitlines())
    for kind in sections().values():
        for field in kind.model_fields.values():
            assert field.description
            assert " ".join(field.description.split()) in words


def test_rendering_round_trips_awkward_values(tmp_path: Path) -> None:
    overrides = ['corpus.text_field="a\\"b\\\\c\\u007f\\n"', "teacher.floor=1e-7", "train.control=false", "run.dir=ü x"]
    settings = load_settings(None, overrides)
    assert settings.corpus.text_field == 'a"b\\c\x7f\n'
    path = tmp_path / "again.toml"
    path.write_text(render_template(settings), encoding="utf-8")
    assert load_settings(path) == settings


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("[teacher]\ntop_k = 4\ndepth = 1\n", encoding="utf-8")
    settings = load_settings(path, ["teacher.top_k=7", "teacher.top_k=8", "teacher.tau=0.5"])
    assert (settings.teacher.top_k, settings.teacher.depth, settings.teacher.tau) == (8, 1, 0.5)


@pytest.mark.parametrize("raw", ["2048", "true", "runs/x", '"2048"', "a=b"])
def test_text_keys_take_bare_words(raw: str) -> None:
    assert load_settings(None, [f"student.tokenizer={raw}"]).student.tokenizer == raw.strip('"')


def test_integers_are_numbers() -> None:
    assert load_settings(None, ["teacher.tau=1"]).teacher.tau == 1.0


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[teacher]\ntop_kk = 3", ["unknown key teacher.top_kk", "did you mean top_k?", "pipeline.toml"]),
        ("[teacher]\nprune = 0.1", ["unknown key teacher.prune", "did you mean convert.prune?"]),
        ("[techer]\ntop_k = 3", ["unknown section techer", "did you mean teacher?"]),
        ("top_k = 3", ["unknown section top_k", "did you mean teacher.top_k?"]),
        ("teacher = 3", ["teacher = 3", "[teacher]"]),
        ("[teacher]\ntop_k = -1", ["teacher.top_k = -1", "an integer >= 0", "default 16"]),
        ('[teacher]\ntop_k = "8"', ['teacher.top_k = "8"', "an integer >= 0"]),
        ("[teacher]\ntop_k = true", ["teacher.top_k = true", "an integer >= 0"]),
        ("[teacher]\ntau = nan", ["teacher.tau = nan"]),
        ("[train]\nlearning_rate = inf", ["train.learning_rate = inf", "finite"]),
        ("[convert]\ntau = -0.5", ["convert.tau = -0.5", ">= 0, or -1"]),
        ('[teacher]\nbackend = "jax"', ['teacher.backend = "jax"', 'one of "vllm", "hf"']),
        ("[corpus]\nheldout_fraction = 1.0", [">= 0 and < 1"]),
        ("[teacher]\ntop_k = [1]", ["[1]", "an integer"]),
        ("[teacher\n", ["is not TOML", "line 1"]),
    ],
)
def test_refusals_name_the_key_the_value_and_the_limit(tmp_path: Path, toml: str, expected: list[str]) -> None:
    message = refusal(tmp_path, toml)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.top_k", "expected section.key=value"),
        ("top_k=8", "expected section.key=value"),
        ("teacher.topk=8", "did you mean top_k?"),
        ("run.dir=", 'run.dir from --set run.dir=: is empty; name one, as the default "runs/default"'),
        ("corpus.source=", "corpus.source from --set corpus.source=: is empty"),
        (
            'corpus.ignore_fields=["a"]',
            """corpus.ignore_fields = ['a'] from --set corpus.ignore_fields=["a"]: expected text""",
        ),
        ("corpus.max_bytes=9" + "9" * 30, "expected a number below 9223372036854775808"),
        ("teacher.top_k=many", 'teacher.top_k = "many" from --set teacher.top_k=many: expected an integer >= 0'),
    ],
)
def test_override_refusals_name_the_option(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refusal(tmp_path, "", override)


def test_a_mark_of_byte_order_and_line_ends_of_windows_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 3\r\n")
    assert load_settings(path).run.seed == 3


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'[run]\ndir = "\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 13"):
        load_settings(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("given", "transfers"),
    [([], True), (["student.tokenizer=bytes"], True), (["student.model=x", "student.tokenizer=bpe:300"], True),
     (["student.model="], False), (["student.model=x"], False), (["student.tokenizer="], False)],
)  # fmt: skip
def test_training_goes_with_the_student_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], transfers: bool
) -> None:
    monkeypatch.chdir(ROOT)
    assert Path("pipeline.toml").is_file(), "the shipped one is beneath, and says nothing of it"
    settings = load_settings(None, [*given, "train.batch=3"])
    wanted = (TRANSFER if transfers else Train().model_dump(include=set(TRANSFER))) | {"batch": 3}
    assert settings.train.model_dump(include=set(TRANSFER)) == wanted
    # Another student than a file's gets its own defaults, and what the file says beyond them.
    (tmp_path / "p.toml").write_text(render_template(settings))
    assert load_settings(tmp_path / "p.toml") == settings
    other = load_settings(tmp_path / "p.toml", ["student.model=", "student.tokenizer="]).train
    assert other.model_dump(include=set(TRANSFER)) == Train(batch=3).model_dump(include=set(TRANSFER))
    assert overrides(settings) == [
        line for line in overrides(settings) if line.startswith("student.") or line == "train.batch=3"
    ], "workers elsewhere work it out from the student"
    assert load_settings(None, overrides(settings)) == settings


def test_in_python_a_student_that_is_named_is_as_it_was_named() -> None:
    assert Settings(student=Student()).student.model == "" and Settings(student=Student()).train == Train()
    assert Settings(train=Train(batch=3)).train == Train(**{**TRANSFER, "batch": 3})


@pytest.mark.parametrize(
    "key", ["a." * 50000 + "a", "[" + ".".join("a" * 30000) + "]\nb", "x={" + "a." * 20000 + "a=1}\ny"]
)
def test_a_key_of_many_parts_is_refused_before_it_costs_memory(tmp_path: Path, key: str) -> None:
    """A parser of TOML takes memory for them in proportion to the square of their number: 9 GB for 100 kB."""
    assert "more than 100 dots" in refusal(tmp_path, f"{key} = 1\n")


@pytest.mark.parametrize("toml", ["[train]\nsteps = " + "1" * 5000, "steps = [" + "1" * 5000 + "]"])
def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path, toml: str) -> None:
    assert "is not TOML" in refusal(tmp_path, toml)
    assert "train.steps" in refusal(tmp_path, "", "train.steps=" + "1" * 5000)


@pytest.mark.parametrize("key", ["student.hidden_size", "student.layers", "student.heads", "train.batch",
                                 "train.window_bytes", "train.lora_rank"])  # fmt: skip
def test_sizes_that_nobody_means_are_refused(tmp_path: Path, key: str) -> None:
    """A run folder's configuration may be a stranger's: a billion layers would take all memory."""
    assert "<=" in refusal(tmp_path, "", f"{key}=1000000000")
