"""The dataset index: round trip, determinism, refusals, and `verify_dataset` against every kind of damage."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from bytecache.schemas.dataset import card
from bytecache.schemas.dataset import index as manifest
from bytecache.schemas.dataset.index import (
    ShardEntry,
    describe_shard,
    index_documents,
    read_dataset,
    seal,
    write_dataset,
)
from bytecache.schemas.dataset.verification import verify_dataset
from bytecache.schemas.errors import InputError, IntegrityError, StorageError
from bytecache.schemas.files import file_sha256
from bytecache.schemas.shard.builder import ShardBuilder

INFO = {"teacher": {"name": "none"}, "tokenizer": {"fingerprint": "0"}, "license": "CC0-1.0", "attribution": "Zoë"}
NAMES = {
    "train-00000-aaaaaaaaaaaa": "train",
    "train-00001-bbbbbbbbbbbb": "train",
    "heldout-00000-cccccccccccc": "heldout",
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three tiny shards; copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("targets")
    entries = []
    for k, (name, split) in enumerate(NAMES.items()):
        builder = ShardBuilder()
        probs = np.full((6, 257), 0.05 / 255, np.float32)
        probs[:, [65, 66]] = 0.6, 0.25
        builder.append(np.full(5, 65 + k, np.uint8), probs, np.full(6, 0.1, np.float32))
        builder.end_document(name)
        path = folder / f"{name}.zarr.zip"
        statistics = builder.write(path, {"k": k})
        entries.append(describe_shard(path, split, name[-12:], statistics))
    write_dataset(folder, entries, INFO)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "targets"))


def rewrite(folder: Path, rows: list[dict[str, Any]], **document: Any) -> None:
    """What an attacker can do: any rows, with hashes that fit."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=manifest._SCHEMA), sink)
    data = sink.getvalue().to_pybytes()
    (folder / "manifest.parquet").write_bytes(data)
    index = json.loads((folder / "dataset.json").read_text())
    index["manifest"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_bytes(seal(index | document))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [entry.model_dump() for entry in read_dataset(folder).entries]


def test_round_trip(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert [entry.file for entry in dataset.entries] == [f"{name}.zarr.zip" for name in sorted(NAMES)]
    assert [entry.split for entry in dataset.split("heldout")] == ["heldout"] and len(dataset.split("train")) == 2
    assert dataset.info["attribution"] == "Zoë" and dataset.info["creation"] == {}
    assert dataset.entries[0].n_positions == 6 and dataset.entries[0].n_bytes == 5
    index = json.loads((folder / "dataset.json").read_text())
    assert index["splits"]["train"]["n_positions"] == 12 and index["splits"]["train"]["n_shards"] == 2
    assert index["manifest"]["sha256"] == hashlib.sha256((folder / "manifest.parquet").read_bytes()).hexdigest()
    assert verify_dataset(folder, deep=True) == []


def test_equal_entries_make_an_equal_index(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("manifest.parquet", "dataset.json")}
    dataset = read_dataset(folder)
    again = write_dataset(folder, reversed(dataset.entries), dict(reversed(INFO.items())))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert again.content_sha256 == dataset.content_sha256
    shutil.copy(folder / dataset.entries[0].file, folder / "train-00002-dddddddddddd.zarr.zip")
    fewer = write_dataset(folder, dataset.entries[1:], INFO)
    assert fewer.content_sha256 != dataset.content_sha256 == hash_of(dataset.entries)


def hash_of(entries: tuple[ShardEntry, ...]) -> str:
    """The recipe of SPEC.md, written out."""
    lines = "".join(json.dumps(entry.model_dump(), sort_keys=True) + "\n" for entry in entries)
    return hashlib.sha256(lines.encode("ascii")).hexdigest()


def test_every_flipped_bit_of_a_shard_is_found(folder: Path) -> None:
    """SPEC 7.9."""
    entry = read_dataset(folder).entries[1]
    path = folder / entry.file
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert [(p.file, p.kind) for p in verify_dataset(folder)] == [(entry.file, "altered")], at
    path.write_bytes(data)
    assert verify_dataset(folder) == []


@pytest.mark.parametrize("name", ["manifest.parquet", "dataset.json"])
def test_every_flipped_bit_of_the_index_is_found(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert [p.kind for p in verify_dataset(folder)] == ["index"], (at, data[at - 9 : at + 9])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"CC0-1.0"', b'"CC0-1.1"'), (b"Zo", b"zo"), (b" ", b"  "), (b"\n", b"\r\n"), (b"}\n", b"}"), (b"{", b'{"a":1,')],
)
def test_an_edited_dataset_json_is_refused(folder: Path, old: bytes, new: bytes) -> None:
    """SPEC 7.7."""
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(IntegrityError, match="damaged or edited"):
        read_dataset(folder)


def test_each_kind_of_damage_has_its_name(folder: Path) -> None:
    first, second, third = read_dataset(folder).entries
    (folder / first.file).unlink()
    with open(folder / second.file, "r+b") as file:
        file.truncate(second.size - 1)
    with open(folder / third.file, "ab") as file:
        file.write(b"x")
    (folder / "train-99999-eeeeeeeeeeee.zarr.zip").write_bytes(b"whatever")
    (folder / "notes.txt").write_text("not a shard, not our business")
    problems = {problem.file: problem for problem in verify_dataset(folder)}
    assert {name: problem.kind for name, problem in problems.items()} == {
        first.file: "missing",
        second.file: "truncated",
        third.file: "altered",
        "train-99999-eeeeeeeeeeee.zarr.zip": "foreign",
    }
    assert str(second.size) in problems[second.file].detail


def test_means_of_a_split_count_supervised_positions(folder: Path) -> None:
    entry = read_dataset(folder).split("train")[0]
    answers = {"file": "train-00008-aaaaaaaaaaaa.zarr.zip", "n_supervised": 2, "tail_mean": 0.5, "sha256": "0" * 64}
    chat = entry.model_copy(update=answers)
    index = json.loads(index_documents([entry.model_copy(update={"tail_mean": 0.25}), chat], {})["dataset.json"])
    assert entry.n_supervised == 6
    assert index["splits"]["train"]["n_supervised"] == 8 and index["splits"]["train"]["tail_mean"] == 0.3125


def test_duplicates_are_found_under_any_name(folder: Path) -> None:
    entry = read_dataset(folder).entries[0]
    copy = "train-00009-ffffffffffff.zarr.zip"
    shutil.copy(folder / entry.file, folder / copy)
    assert [(p.file, p.kind) for p in verify_dataset(folder)] == [(copy, "duplicated")]
    with pytest.raises(InputError, match="already listed"):
        write_dataset(folder, [entry, entry.model_copy(update={"file": copy})], INFO)
    with pytest.raises(InputError, match="already listed"):
        write_dataset(folder, [entry, entry], INFO)


def test_deep_verification_opens_shards(folder: Path) -> None:
    rows = rows_of(folder)
    rows[0]["n_entries"] += 1
    entries = [ShardEntry(**row) for row in rows]
    path = folder / rows[1]["file"]
    path.write_bytes(b"not a zip")
    entries[1] = entries[1].model_copy(update={"size": 9, "sha256": file_sha256(path)})
    write_dataset(folder, entries, INFO)
    assert verify_dataset(folder) == []
    found = verify_dataset(folder, deep=True)
    assert [(p.file, p.kind) for p in found] == [(rows[0]["file"], "inconsistent"), (rows[1]["file"], "inconsistent")]
    assert "n_entries" in found[0].detail


@pytest.mark.parametrize(
    "name",
    ["../x.zarr.zip", "/etc/x.zarr.zip", "a/b.zarr.zip", "a\\b.zarr.zip", ".x.zarr.zip", "x.txt", "x.zarr.zip\n"],
)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    """SPEC 7.3."""
    rows = rows_of(folder)
    with pytest.raises(ValidationError):
        ShardEntry(**rows[0] | {"file": name})
    rewrite(folder, [rows[0] | {"file": name}])
    with pytest.raises(IntegrityError, match=r"manifest\.parquet: file .*refused"):
        read_dataset(folder)


def test_a_manifest_that_fits_its_hash_but_not_the_rules_is_refused(folder: Path) -> None:
    """SPEC 7.2."""
    rows = rows_of(folder)
    for change, words in (
        ({"sha256": "0"}, "sha256 '0' refused"),
        ({"size": -1}, "size -1 refused"),
        ({"tail_mean": float("nan")}, "tail_mean nan refused"),
        ({"n_bytes": 6}, "6 bytes and 1 documents are not 6 positions"),
        ({"n_supervised": 7}, "7 supervised and"),
        ({"n_entries": 6 * 257 + 1}, "1543 entries of 6 positions"),
        ({"n_positions": 1 << 40, "n_bytes": (1 << 40) - 1}, "positions in a file of"),
        ({"key": "other"}, "content hash or totals do not match"),
    ):
        rewrite(folder, [rows[0] | change, *rows[1:]])
        with pytest.raises(IntegrityError, match=words):
            read_dataset(folder)
    for changed in (rows[::-1], [rows[0], *rows]):
        rewrite(folder, changed)
        with pytest.raises(IntegrityError, match="sorted and listed once"):
            read_dataset(folder)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"version": 2}, "version 2, this reader knows 1"),
        ({"format": "other"}, "is not a 'bytecache.dataset'"),
        ({"splits": {}}, "totals"),
        ({"info": []}, "must be an object"),
        ({"info": {"license": 3}}, "info: license is a number, must be text"),
        ({"fidelity": "good"}, "`fidelity` must be"),
        ({"manifest": {"file": "../manifest.parquet"}}, r"manifest\.file"),
    ],
)
def test_a_foreign_or_wrong_index_is_refused_with_its_reason(folder: Path, document: Any, words: str) -> None:
    """SPEC 10.1."""
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_bytes(seal(index | document))
    with pytest.raises(IntegrityError, match=words):
        read_dataset(folder)
    assert [p.kind for p in verify_dataset(folder)] == ["index"]


DEEP: Any = {}
for _ in range(500):
    DEEP = {"a": DEEP}
UNIT = {"unit": 1, "n_documents": 1, "n_bytes": 1, "reason": ""}
HOSTILE_INFO: dict[str, Any] = {
    "teacher is a list": {"teacher": [1]},
    "settings of the teacher are text": {"teacher": {"settings": "tau = 0"}},
    "the model is an object": {"teacher": {"model": {"a": 1}}},
    "weights are a list": {"teacher": {"weights": ["x"]}},
    "windows are text": {"teacher": {"windows": "1024"}},
    "missing is an object": {"creation": {"missing": {"unit": 1}}},
    "missing holds text": {"creation": {"missing": ["unit 3"]}},
    "missing holds a truth value": {
        "creation": {"missing": [{"unit": True, "n_documents": 1, "n_bytes": 1, "reason": ""}]}
    },
    "convert is a number": {"settings": {"convert": 3}},
    "set_aside is a list": {"creation": {"set_aside": [1]}},
    "deep": {"corpus": DEEP},
    "attribution is null": {"attribution": None},
}


@pytest.mark.parametrize("name", HOSTILE_INFO)
def test_provenance_of_another_shape_is_refused_for_every_reader(name: str, folder: Path) -> None:
    """SPEC 7.2: what the card, `status`, `fidelity` and `convert` read of a stranger's index has its kind."""
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_bytes(seal(index | {"info": HOSTILE_INFO[name]}))
    with pytest.raises(IntegrityError, match=r"dataset\.json: info: "):
        read_dataset(folder)


def test_a_manifest_of_more_rows_than_its_size_can_tell_apart(folder: Path) -> None:
    """SPEC 9.3: each row has a hash of its own, which does not compress."""
    row = rows_of(folder)[0]
    rewrite(folder, [row] * 5000)
    with pytest.raises(IntegrityError, match=r"5000 rows of \d+ bytes in a file of \d+, at most \d+ rows"):
        read_dataset(folder)


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet", "README.md"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_read_for_one(name: str, kind: str, folder: Path) -> None:
    """SPEC 9.3. A pipe would be waited for, a device read without end."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    problems = verify_dataset(folder)
    assert [problem.kind for problem in problems] == ["unreadable" if name == "README.md" else "index"]
    assert "not a regular file" in problems[0].detail
    if name != "README.md":
        with pytest.raises(IntegrityError, match="not a regular file"):
            read_dataset(folder)
    assert not card.is_ours(folder / "README.md") or name != "README.md"


def test_an_index_that_says_little_is_read(folder: Path) -> None:
    """SPEC 7.2: of `info` nothing is required; a reader finds every part, empty."""
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_bytes(seal(index | {"info": {"more": [{}]}}))
    info = read_dataset(folder).info
    assert info["creation"] == info["teacher"] == {} and info["name"] == "" and info["more"] == [{}]
    assert card.render(index | {"info": info})


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "-1e400", "9" * 19])
def test_numbers_beyond_what_they_can_be(number: str, folder: Path) -> None:
    """SPEC 9.3."""
    raw = (folder / "dataset.json").read_bytes()
    (folder / "dataset.json").write_bytes(
        raw.replace(b'"fidelity": null', b'"fidelity": {"kl": {"mean": ' + number.encode() + b"}}")
    )
    with pytest.raises(IntegrityError, match="beyond"):
        read_dataset(folder)


def test_an_unfinished_dataset_is_refused(folder: Path) -> None:
    """SPEC 7.1."""
    (folder / "dataset.json").unlink()
    with pytest.raises(IntegrityError, match="never finished"):
        read_dataset(folder)
    (folder / "dataset.json").write_text("[")
    with pytest.raises(IntegrityError, match="not JSON"):
        read_dataset(folder)


def test_nothing_is_indexed_before_its_shard_is_there(folder: Path, tmp_path: Path) -> None:
    entries = read_dataset(folder).entries
    with pytest.raises(InputError, match="missing, or not of"):
        write_dataset(tmp_path, entries, INFO)
    for bad in ({"license": 3}, {"teacher": "name"}, {"x": float("nan")}, {"x": "\ud800"}, {"x": object()}):
        with pytest.raises(InputError, match="dataset info"):
            write_dataset(folder, entries, bad)
    assert verify_dataset(folder) == [], "a refused call must leave the old index whole"


def test_a_failed_write_leaves_the_old_file_and_no_litter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in folder.iterdir())
    content = (folder / "manifest.parquet").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"manifest\.parquet.*No space left"):
        write_dataset(folder, read_dataset(folder).entries[:1], INFO)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "manifest.parquet").read_bytes() == content


def test_the_card_repeats_the_index_and_keeps_what_people_wrote(folder: Path) -> None:
    readme = folder / "README.md"
    entries = read_dataset(folder).entries
    evil = "x\n---\n# Fake <script>alert(1)</script> | [a](b)"
    write_dataset(folder, entries, INFO | {"name": evil, "attribution": evil, "license": "my own\n terms"})
    text = readme.read_text()
    header = text.split("---\n")[1]
    assert 'pretty_name: "x --- # Fake' in header and 'license_name: "my own terms"' in header
    assert "<script>" not in text.split("---\n", 2)[2] and text.count("\n---\n") == 1
    assert read_dataset(folder).content_sha256 in text
    write_dataset(folder, entries, INFO, {"kl": {"mean": 0.00123456}})
    assert 'license: "cc0-1.0"' in readme.read_text() and "| kl.mean | 0.001235 |" in readme.read_text()
    made = readme.read_bytes()
    for at in range(len(made)):
        assert card.fault(made[:at] + bytes([made[at] ^ 1 << at % 8]) + made[at + 1 :]), at
    assert card.fault(made) == "" and card.fault(made[:-1]) and card.fault(made + b"\n")
    readme.write_bytes(made.replace(b"kl.mean", b"kl.meen"))
    assert [(p.file, p.kind) for p in verify_dataset(folder)] == [("README.md", "altered")]
    readme.write_text("my own card")
    write_dataset(folder, entries, INFO)
    assert readme.read_text() == "my own card"
    assert verify_dataset(folder) == []


def test_the_card_says_in_words_what_targets_are_worth(folder: Path) -> None:
    entries = read_dataset(folder).entries

    def card_of(info: dict[str, Any], fidelity: dict[str, Any] | None = None) -> str:
        write_dataset(folder, entries, INFO | info, fidelity)
        return (folder / "README.md").read_text()

    served = {"model": "m", "served": "big", "settings": {"backend": "server", "top_k": 64}}
    assert "only the 64 likeliest were known" in card_of({"teacher": served})
    assert "only the 20 likeliest were known" in card_of({"teacher": {"kind": "foreign", "cache": {"k": 20}}})
    plain = card_of({"teacher": {"model": "m", "dtype": "bfloat16", "head_dtype": "float32", "adapter": "mine"}})
    assert "likeliest were known" not in plain and "A mixture" not in plain
    assert "| teacher's precision | bfloat16, head float32 |" in plain and "| adapter | mine |" in plain
    sources = [{"teacher": {"model": "a"}}, {"teacher": {"model": "<b>"}}]
    mixed = {"bits_per_byte": [1.25, 1.5], "bits_per_byte_mixed": 1.2, "sources": sources}
    assert "it gives the text 1.200 bits a byte" in card_of({"mix": mixed})
    for broken in ({"bits_per_byte": 3}, {"sources": [None], "bits_per_byte": ["x"], "bits_per_byte_mixed": 1}, []):
        card_of({"mix": broken})
    noisy = card_of({}, {"kl": {"mean": 0.01}, "noise": {"kl": {"mean": 0.002}}})
    assert "precision against float32, is 0.002 nats a byte" in noisy and "<details>" in noisy
    later = card_of({"edition": {"number": 2, "parent": "ab" * 32}})
    assert "| edition | 2 |" in later and "ab" * 32 in later
