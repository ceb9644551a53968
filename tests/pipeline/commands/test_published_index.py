"""What is published is made from receipts that check, and compared with the shards; nothing unknown is deleted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytecache.pipeline.stores import LocalStore
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.dataset import index
from bytecache.schemas.dataset.index import index_documents, read_dataset, seal
from tests.support.command_line import FakeTeacher, bytecache, finished_run, refusal
from tests.support.run_outputs import outputs

SMALL = ("--set", "convert.shard_bytes=2500")


@pytest.fixture
def run(world: Path, fake_teacher: type[FakeTeacher], fake_convert: None, kept_runs: Path) -> Path:
    (world / "pipeline.toml").write_text((world / "pipeline.toml").read_text() + "[convert]\nshard_bytes = 2500\n")
    return finished_run(world, kept_runs)


def index_of(run: Path) -> dict[str, bytes]:
    return {name: (run / "targets" / name).read_bytes() for name in ("dataset.json", "manifest.parquet", "README.md")}


def receipts_of(run: Path, stage: str) -> list[Path]:
    return sorted((run / "receipts" / stage).glob("*.json"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool) -> None:
    """Change a receipt's values; `sealed`: as one who knows the format would, else as a slip of an editor."""
    document = json.loads(path.read_text())
    change(document)
    document.pop("sha256") if sealed else None
    if sealed:
        path.write_bytes(receipts.receipt_bytes(Receipt.model_validate(document)))
    else:
        path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def raise_counts(document: dict[str, Any]) -> None:
    document["counts"]["n_entries"] += 1


@pytest.mark.parametrize("stage", ["plan", "teacher", "convert"])
def test_one_digit_of_a_receipt_is_found_and_never_published(run: Path, stage: str) -> None:
    before, index = outputs(run), index_of(run)
    victim = receipts_of(run, stage)[0]
    number = {"plan": "units", "teacher": "tokens", "convert": "n_positions"}[stage]

    def change(document: dict[str, Any]) -> None:
        document["counts"][number] += 1

    rewrite(victim, change, sealed=False)
    assert victim.name[:12] in bytecache("verify").stdout
    assert "does not match its own sha256" in bytecache("verify").stdout
    assert bytecache("convert").exit_code == (3 if stage == "teacher" else 0), "a dump part needs its teacher"
    assert index_of(run) == index
    for command in ("plan", "teacher", "convert"):
        assert bytecache(command).exit_code == 0
        assert index_of(run) == index
    assert bytecache("verify", "--repair").exit_code == 0
    assert outputs(run) == before and bytecache("verify").exit_code == 0


@pytest.mark.parametrize("damaged", ["dataset.json", "manifest.parquet", ""])
def test_an_index_is_made_once_where_it_is_made_anew(run: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    """Of a data set of many shards it takes its time; where nothing has to be written it is not made at all."""
    before, made = outputs(run), []
    make = index.index_documents
    monkeypatch.setattr(index, "index_documents", lambda *what: (made.append(1), make(*what))[1])
    if damaged:
        (run / "targets" / damaged).write_bytes(b"{}")
    assert bytecache("convert").exit_code == 0
    assert len(made) == bool(damaged) and outputs(run) == before


def test_a_receipt_that_was_sealed_anew_does_not_change_what_is_published(run: Path) -> None:
    before, index = outputs(run), index_of(run)
    rewrite(receipts_of(run, "convert")[0], raise_counts, sealed=True)
    message = refusal(bytecache("convert"), 4)
    assert "receipts and the published index disagree" in message and "n_entries is" in message
    assert "`bytecache verify --repair`" in message
    assert index_of(run) == index
    assert "receipts and index disagree" in bytecache("verify").stdout
    assert bytecache("verify", "--repair").exit_code == 0
    assert outputs(run) == before and bytecache("verify").exit_code == 0


def test_an_index_that_was_sealed_anew_is_told_by_its_shards(run: Path) -> None:
    before, dataset = outputs(run), read_dataset(run / "targets")
    false = [entry.model_copy(update={"n_entries": entry.n_entries + 9}) for entry in dataset.entries]
    for name, raw in index_documents(false, dataset.info, dataset.fidelity).items():
        (run / "targets" / name).write_bytes(raw)
    assert "disagree" in bytecache("verify").stdout
    assert "n_entries is" in bytecache("verify", run / "targets", "--deep").stdout
    assert "disagree" in refusal(bytecache("convert"), 4)
    assert bytecache("verify", "--repair").exit_code == 0
    assert outputs(run) == before


def test_where_both_lie_only_the_shards_tell(run: Path) -> None:
    before = outputs(run)
    rewrite(receipts_of(run, "convert")[0], raise_counts, sealed=True)
    for path in (run / "targets").glob("[dm]*[!p]"):
        path.unlink()
    assert bytecache("convert").exit_code == 0, "nothing contradicts the receipt before the shard is opened"
    assert bytecache("verify").exit_code == 0
    assert "n_entries is" in bytecache("verify", "--deep").stdout
    assert bytecache("verify", "--deep", "--repair").exit_code == 0
    assert outputs(run) == before and bytecache("verify", "--deep").exit_code == 0


def test_a_certificate_that_differs_alone_is_measured_again(run: Path) -> None:
    before = outputs(run)
    document = json.loads((run / "targets/dataset.json").read_text())
    (run / "targets/dataset.json").write_bytes(seal(document | {"fidelity": {"kl": {"mean": 0.0}}}))
    assert "the certificate of fidelity" in refusal(bytecache("convert"), 4)
    assert bytecache("verify", "--repair").exit_code == 0
    assert outputs(run) == before


@pytest.mark.parametrize("sealed", [False, True])
def test_the_teacher_of_a_dump_is_hashed_against_its_key(run: Path, sealed: bool, fake_teacher: type) -> None:
    """An altered identity used to be published, an altered group to send the user in a circle."""
    before = outputs(run)
    for path in (run / "targets").glob("*"):
        path.unlink()
    for path in receipts_of(run, "convert"):
        path.unlink()
    for path in receipts_of(run, "teacher"):
        rewrite(path, lambda document: document["inputs"]["teacher"].update(model="another"), sealed=sealed)
    result = bytecache("convert")
    assert "run `bytecache teacher`" in refusal(result, 3)
    assert "do not hash to its key" in result.stderr or "its own sha256" in result.stderr
    assert bytecache("teacher").exit_code == 0 and bytecache("convert").exit_code == 0
    assert outputs(run) == before and b"another" not in (run / "targets/dataset.json").read_bytes()


@pytest.mark.parametrize("lost", ["missing", "damaged"])
@pytest.mark.parametrize("command", [("convert",), ("verify", "--repair")])
def test_a_shard_that_nothing_lists_is_never_deleted(run: Path, lost: str, command: tuple[str, ...]) -> None:
    before = outputs(run)
    stranger = run / "targets/train-00078-bbbbbbbbbbbb.zarr.zip"
    stranger.write_bytes(b"somebody's work")
    index = run / "targets/dataset.json"
    index.unlink() if lost == "missing" else index.write_bytes(b"{}")
    assert bytecache(*command).exit_code == 0
    assert outputs(run) == before
    (kept,) = (run / "set-aside").rglob(stranger.name)
    assert kept.read_bytes() == b"somebody's work"
    assert bytecache("verify").exit_code == 0


def test_shards_of_an_earlier_conversion_are_set_aside(run: Path) -> None:
    earlier = {path.name: path.read_bytes() for path in (run / "targets").glob("*.zip")}
    (run / "targets/dataset.json").unlink()
    assert bytecache("convert", "--set", "convert.prune=0.01").exit_code == 0
    kept = {path.name: path.read_bytes() for path in (run / "set-aside").glob("*.zip")}
    assert kept == earlier and bytecache("verify").exit_code == 0


@pytest.mark.parametrize("harm", ["missing", "empty", "half", "edited"])
@pytest.mark.parametrize("command", [("convert",), ("verify", "--repair")])
def test_a_card_is_reported_and_made_again(run: Path, harm: str, command: tuple[str, ...]) -> None:
    card = run / "targets/README.md"
    raw = card.read_bytes()
    if harm == "missing":
        card.unlink()
    else:
        card.write_bytes(
            {"empty": b"", "half": raw[: len(raw) // 2], "edited": raw.replace(b"shards", b"shard5")}[harm]
        )
    assert "README.md" in bytecache("verify").stdout and bytecache("verify").exit_code == 4
    result = bytecache(*command)
    assert result.exit_code == 0 and "README.md" in result.stdout
    assert card.read_bytes() == raw and bytecache("verify").exit_code == 0


def test_a_card_of_somebodys_own_is_kept(run: Path) -> None:
    card = run / "targets/README.md"
    card.write_text("# My targets\nmade with care\n")
    for command in (("verify",), ("convert",), ("verify", "--repair")):
        assert bytecache(*command).exit_code == 0
        assert card.read_text().startswith("# My targets")


def test_a_receipt_has_one_spelling(run: Path) -> None:
    """Every flipped bit, and every other way to write the same values."""
    victim = receipts_of(run, "convert")[0]
    store, key, raw = LocalStore(run), victim.stem, victim.read_bytes()
    assert receipts.read_receipt(store, "convert", key) is not None
    spellings = [raw.replace(b" ", b"  "), raw.strip(), json.dumps(json.loads(raw)).encode()]
    flips = [raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :] for at in range(0, len(raw), 3)]
    unsealed = {name: value for name, value in json.loads(raw).items() if name != "sha256"}
    for other in (*spellings, *flips, json.dumps(unsealed).encode()):
        victim.write_bytes(other)
        assert bytecache("verify").exit_code == 4 if other in spellings else receipts.parse_receipt(other, "") is None
    victim.write_bytes(raw)
    document = json.loads(raw)
    values = {name: value for name, value in document.items() if name != "sha256"}
    assert document["sha256"] == hashlib.sha256(receipts.canonical_json(values)).hexdigest()
