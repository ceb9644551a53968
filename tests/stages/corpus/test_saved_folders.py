"""Folders of `datasets.save_to_disk`: exactly the data set's own files; splits are never mixed unasked."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from bytecache.schemas.errors import InputError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.files import corpus_files
from bytecache.stages.corpus.reader import CorpusReader


def saved(folder: Path, *pieces: list[str], **state: object) -> Path:
    """As `save_to_disk` writes it: streams of Arrow, and a state that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(pieces):05d}.arrow" for number in range(len(pieces))]
    for name, texts in zip(names, pieces, strict=True):
        table = pa.table({"text": texts})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "f", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def texts(source: Path) -> list[str]:
    return [document.text for document in CorpusReader(Corpus(source=str(source)))]


def test_the_files_that_the_state_names_in_its_order(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", ["one", "two"], ["three"])
    (folder / "data-00000-of-00009.arrow").write_bytes(b"left over from an earlier save")
    (folder / "cache-1234.arrow").write_bytes(b"a copy")
    assert texts(folder) == ["one", "two", "three"]
    assert corpus_files(Corpus(source=str(folder)))[1] == []  # nothing of it is a stranger


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / split, [split])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"splits train, test; name the folder of one, such as .*train"):
        texts(tmp_path)
    assert texts(tmp_path / "train") == ["train"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts(tmp_path) == ["train"]
    assert [file.name for file in corpus_files(Corpus(source=str(tmp_path)))[0]] == ["train/data-00000-of-00001.arrow"]


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", ["one"])
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match="which is not there"):
        texts(folder)
    with pytest.raises(InputError, match="flatten_indices"):
        texts(saved(tmp_path / "picked", ["one"], _indices_files=[{"filename": "indices.arrow"}]))
    outside = saved(tmp_path / "outside", ["one"], _data_files=[{"filename": "../set/data.arrow"}])
    with pytest.raises(InputError, match="which is not there"):
        texts(outside)
    broken = saved(tmp_path / "broken", ["one"])
    (broken / "state.json").write_text("{")
    with pytest.raises(InputError, match="save the data set again"):
        texts(broken)


def test_a_folder_that_the_package_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip(
        "datasets", reason="lock/hub.txt is not installed (make hub): `datasets` was not tried"
    )
    some = datasets.Dataset.from_dict({"text": [f"document {number}" for number in range(7)]})
    some.shuffle(seed=1).save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert sorted(texts(tmp_path / "one")) == [f"document {number}" for number in range(7)]
    datasets.DatasetDict({"train": some, "test": some}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(InputError, match="splits train, test"):
        texts(tmp_path / "both")
    assert texts(tmp_path / "both" / "test") == [f"document {number}" for number in range(7)]
