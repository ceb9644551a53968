"""What is remembered of a checkpoint: found again for the same files and question, never for others, never damaged."""

import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.stages.models import remembered as module
from bytecache.stages.models.remembered import remembered


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    return checkpoint


def test_an_answer_is_found_out_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def find_out() -> dict[str, int]:
        asked.append(1)
        return {"answer": len(asked)}

    assert [remembered(folder, {"q": 1}, find_out) for _ in range(3)] == [{"answer": 1}] * 3
    assert remembered(folder, {"q": 2}, find_out) == {"answer": 2}
    (folder / "config.json").write_text("[]")
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 3}
    (folder / "tokenizer_config.json").write_text("{}")
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 4}
    monkeypatch.setattr(module, "_code", lambda: {"other": "code"})
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 5}
    monkeypatch.setattr(module, "_versions", lambda: {"torch": "9"})
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 6}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 7}
    assert remembered(folder, {"q": 1}, find_out) == {"answer": 7}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"answer": "b", "sha256": "00"}', b'{"answer": "b"}'])
def test_a_damaged_answer_is_found_out_again(folder: Path, tmp_path: Path, damage: bytes) -> None:
    assert remembered(folder, {}, lambda: "a") == "a"
    (place,) = (tmp_path / "cache" / "answers").iterdir()
    place.write_bytes(damage)
    assert remembered(folder, {}, lambda: "c") == "c"
    assert remembered(folder, {}, lambda: "d") == "c"


def test_a_refusal_is_not_remembered_and_a_cache_out_of_reach_costs_time_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered(folder, {}, refuse)
    assert remembered(folder, {}, lambda: "yes") == "yes"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "file"))
    assert remembered(folder, {}, lambda: "now") == "now"


def test_an_answer_depends_on_the_code_of_all_that_can_be_in_it() -> None:
    """An identity names the rule of effort, of another stage: after an update an old answer is not the engine's."""
    program = (
        "import sys, bytecache.stages.teacher.identity, bytecache.stages.teacher.start\n"
        "for name, module in sys.modules.items():\n"
        "    if name.startswith(('bytecache.stages.', 'bytecache.schemas.')): print(module.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded = {"/".join(Path(line).parts[-2:]) for line in done.stdout.splitlines()}
    known = {"/".join(["", *name.split("/")][-2:]) for name in module._code()}
    assert "lattice/effort.py" in loaded and loaded <= known
