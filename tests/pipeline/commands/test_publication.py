"""What is published beside a data set: a card for strangers, rows, a picture, Croissant; and nothing of a machine."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bytecache.pipeline.commands.publication import extras, refuse_private
from bytecache.pipeline.commands.share import HubPlace
from bytecache.schemas.dataset import card
from bytecache.schemas.dataset.index import read_dataset, write_dataset
from bytecache.schemas.errors import ConfigError
from tests.support.student_data import make_dataset

PLACE = "hf://datasets/me/books"
INFO = {
    "name": "Books in bytes", "license": "CC-BY-SA-4.0", "corpus_license": "CC-BY-SA-4.0",
    "teacher_license": "Apache-2.0", "attribution": "Their authors", "teacher": {"model": "owner/model"},
}  # fmt: skip
FIDELITY = {
    "kl": {"mean": 0.0026, "p99": 0.03},
    "leak": {"mean": -0.0004},
    "sample": {"positions": 8192},
    "bound": {"jsd": 0.003},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_dataset(tmp_path_factory.mktemp("published") / "d", documents=6, per_shard=3)
    write_dataset(folder, read_dataset(folder).entries, INFO, FIDELITY)
    return folder


@pytest.fixture(scope="module")
def published(folder: Path) -> dict[str, bytes]:
    return made(folder)


def made(folder: Path) -> dict[str, bytes]:
    place = HubPlace.parse(PLACE)
    return extras(folder, read_dataset(folder), PLACE, *place.addresses("https://hub.example/"))


def test_the_same_bytes_every_time(folder: Path, published: dict[str, bytes]) -> None:
    assert made(folder) == published
    assert published.keys() == {
        "README.md",
        "croissant.json",
        "preview/train.parquet",
        "preview/heldout.parquet",
        "preview/entropy.svg",
    }


def test_the_card_says_first_what_it_is_and_whose(published: dict[str, bytes]) -> None:
    text = published["README.md"].decode()
    header, body = text.split("---\n", 2)[1:]
    front = yaml.safe_load(header)
    assert front["license"] == "cc-by-sa-4.0" and "viewer" not in front
    (config,) = front["configs"]
    for file in config["data_files"]:
        assert file["path"] in published and file["split"] in ("train", "heldout")
    headings = re.findall(r"^## (.*)$", body, re.M)
    assert headings == [
        "Licence and attribution", "Train from it", "What is in it", "How true it is", "Where it comes from",
    ]  # fmt: skip
    opening = body.split("## ")[0]
    assert opening.count(". ") + opening.count(").\n") == 2, "two sentences"
    assert "owner/model" in opening and "- Attribution: Their authors" in body
    (program,) = re.findall(r"```python\n(.*?)```", body, re.S)
    assert len(program.splitlines()) == 8 and PLACE in program
    assert "8,192 sampled positions" in body and "ones by 0.0026\nnats a byte" in body and "0.0004 bits less" in body
    assert "![" in body and "(preview/entropy.svg)" in body
    assert card.fault(published["README.md"]) == ""


def test_rows_can_be_read_and_are_the_teachers(folder: Path, published: dict[str, bytes]) -> None:
    from bytecache.schemas.shard.reader import read_shard

    dataset = read_dataset(folder)
    table = pq.read_table(pa.BufferReader(published["preview/train.parquet"])).to_pylist()
    assert 100 < len(table) < 1000 and len(published["preview/train.parquet"]) < 100_000
    shard = read_shard(folder / dataset.split("train")[0].file)
    for row in table[:: len(table) // 40]:
        at = int(shard.doc_start[shard.doc_id.index(row["document"])]) + row["position"]
        dense = shard.dense(at, at + 1, spread_tail=True)[0].astype(float)
        assert row["entropy_bits"] == pytest.approx(-(dense[dense > 0] * np.log2(dense[dense > 0])).sum(), abs=1e-3)
        assert row["unlisted"] == pytest.approx(float(shard.tails(at, at + 1)[0]), abs=1e-6)
        names = [part.rsplit(" ", 1)[0] for part in row["teacher_expects"].split(", ")]
        assert len(names) == 4
    ends = [row for row in table if row["next_byte"] == "END"]
    assert ends and all(0 <= row["probability_of_next"] <= 1 for row in table)


def test_the_picture_shows_the_text(published: dict[str, bytes]) -> None:
    root = ElementTree.fromstring(published["preview/entropy.svg"])
    letters = "".join(element.text or "" for element in root.iter() if element.get("font-family") == "monospace")
    assert len(letters) > 40
    shades = {element.get("fill-opacity") for element in root.iter() if element.get("fill-opacity")}
    assert len(shades) > 3


def test_croissant_is_valid(folder: Path, published: dict[str, bytes], tmp_path: Path) -> None:
    value = json.loads(published["croissant.json"])
    assert value["conformsTo"] == "http://mlcommons.org/croissant/1.0" and value["license"] == "CC-BY-SA-4.0"
    for name, raw in published.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    croissant = pytest.importorskip(
        "mlcroissant", reason="lock/hub.txt is not installed (make hub): Croissant was not validated"
    )
    described = croissant.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert not described.metadata.issues.errors, described.metadata.issues.report()
    assert {records.id for records in described.metadata.record_sets} == {
        "shard_list",
        "preview_train",
        "preview_heldout",
    }
    # And its records are the preview's: where the files are not on a hub but here.
    local = json.loads(published["croissant.json"])
    for file in local["distribution"]:
        if file["@id"].startswith("preview"):
            file["contentUrl"] = file["name"]
    (tmp_path / "local.json").write_text(json.dumps(local))
    records = list(croissant.Dataset(jsonld=str(tmp_path / "local.json")).records("preview_train"))
    table = pq.read_table(pa.BufferReader(published["preview/train.parquet"])).to_pylist()
    assert len(records) == len(table)
    assert [int(record["preview_train/position"]) for record in records] == [row["position"] for row in table]


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"teacher": {"model": "/home/me/models/x"}}, "info.teacher.model"),
        ({"corpus": {"source": "~/books/a.jsonl"}}, "info.corpus.source"),
        ({"attribution": "see C:\\Users\\me\\x"}, "info.attribution"),
        ({"creation": {"missing": [{"reason": "/mnt/disk/x is full"}]}}, r"info.creation.missing\[0\].reason"),
        ({"teacher": {"revision": "hf_abcdefghijklmnopqrstuvwx"}}, "info.teacher.revision"),
        ({"settings": {"fleet": {"workers": 3}}}, "info.settings.fleet.workers"),
        ({"name": "by very-secret-value"}, "info.name holds a secret"),
    ],
)
def test_what_belongs_to_a_machine_is_refused_by_name(
    info: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    with pytest.raises(ConfigError, match=why):
        refuse_private({"info": info})


def test_ordinary_words_are_not_refused() -> None:
    refuse_private(
        {"info": {"license": "https://example.org/data/licence", "name": "and/or", "n": 3, "x": [None, 1.5]}}
    )
