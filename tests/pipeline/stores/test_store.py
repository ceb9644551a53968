"""The local store: links, temporary files, refusals of the disk with a remedy. The contract is in store_suite.py."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.stores import TEMP_FOLDER, LocalStore, disk_errors
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt, canonical_json, unit_key
from bytecache.schemas.errors import IntegrityError, StorageError
from tests.support.places import ROOT


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "deep" / "run")


def temporary_files(store: LocalStore) -> list[Path]:
    return sorted((store.root / TEMP_FOLDER).iterdir())


def test_first_writer_wins_and_nothing_temporary_is_left(store: LocalStore) -> None:
    assert store.put_if_absent("a/b.bin", store.write_temp("b.bin", b"one"))
    assert not store.put_if_absent("a/b.bin", store.write_temp("b.bin", b"two"))
    assert store.get_path("a/b.bin").read_bytes() == b"one"
    with store.open("a/b.bin") as stream:
        assert stream.read() == b"one"
    assert temporary_files(store) == []


def test_reading_makes_no_folder(store: LocalStore) -> None:
    assert not store.exists("a")
    assert list(store.list("a")) == []
    assert store.sweep() == 0
    assert not store.root.exists()


def test_file_systems_without_links(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert store.put_if_absent("a", store.write_temp("a", b"one"))
    assert not store.put_if_absent("a", store.write_temp("a", b"two"))
    assert store.get_path("a").read_bytes() == b"one"
    assert temporary_files(store) == []


def test_sweep_takes_only_what_dead_processes_left(store: LocalStore) -> None:
    mine = store.write_temp("mine", b"")
    code = (
        "import sys; from pathlib import Path; from bytecache.pipeline.stores import LocalStore\n"
        "LocalStore(Path(sys.argv[1])).write_temp('theirs', b'x')"
    )
    root = ROOT
    subprocess.run([sys.executable, "-c", code, str(store.root)], check=True, cwd=root)
    foreign = store.root / TEMP_FOLDER / "0a0a0a0a-1-1-0-other-machine"
    foreign.write_bytes(b"")
    old = store.root / TEMP_FOLDER / "0a0a0a0a-1-1-0-old"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    recycled = mine.with_name("-".join([*mine.name.split("-")[:2], "1", "0-recycled"]))
    recycled.write_bytes(b"")
    assert len(temporary_files(store)) == 5
    assert store.sweep() == 3
    assert temporary_files(store) == sorted([mine, foreign])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EROFS, "writable folder"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
    ],
)
def test_refusals_of_the_disk_name_the_remedy(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    temporary = store.write_temp("a", b"one")

    def refuse(*args: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=remedy):
        store.put_if_absent("a", temporary)
    assert not store.exists("a")
    assert temporary_files(store) == []


def test_arrow_forgets_the_number_of_a_full_disk() -> None:
    with pytest.raises(StorageError, match="disk is full"), disk_errors("writing x"):
        raise OSError("Write failed: No space left on device")


def test_other_system_errors_are_not_disguised() -> None:
    with pytest.raises(FileNotFoundError), disk_errors("writing x"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_real_limit_of_the_system(tmp_path: Path) -> None:
    """`ulimit -f` makes the kernel refuse the write, as a full disk does."""
    code = (
        "import sys, resource; from pathlib import Path; from bytecache.pipeline.stores import LocalStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from bytecache.schemas.errors import StorageError\n"
        "store = LocalStore(Path(sys.argv[1]))\n"
        "try: store.write_temp('big', bytes(5000))\n"
        "except StorageError as error: print(error)\n"
        "print(list((store.root / '.tmp').iterdir()))"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert "file-size limit" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_run_folder_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a folder"):
        LocalStore(tmp_path / "file" / "run").put_json_if_absent("a", {})


def test_many_answers_come_in_order_and_the_first_failure_is_raised() -> None:
    from bytecache.pipeline.stores import overlapped

    for count in (3, 500):
        assert overlapped(lambda number: number * 2, range(count)) == [2 * number for number in range(count)]
        with pytest.raises(StorageError, match="number 2"):
            overlapped(fail_from_two, range(count))


def fail_from_two(number: int) -> None:
    if number >= 2:
        raise StorageError(f"number {number}")


def test_keys_depend_on_content_only() -> None:
    assert unit_key("s", {"a": 1, "b": [1.5, "ü"]}) == unit_key("s", {"b": [1.5, "ü"], "a": 1})
    assert (
        len({unit_key("s", {"a": 1}), unit_key("t", {"a": 1}), unit_key("s", {"a": 2}), unit_key("s", {"a": "1"})}) == 4
    )
    assert canonical_json({"b": 1, "a": "ü"}) == b'{"a":"\\u00fc","b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})


def receipt(store: LocalStore) -> Receipt:
    store.put_if_absent("out/a", store.write_temp("a", b"content"))
    made = Receipt(stage="s", key="k" * 64, name="a", files=(receipts.record_file(store, "out/a"),))
    assert receipts.write_receipt(store, made)
    return made


def test_receipts_round_trip_and_notice_every_change(store: LocalStore) -> None:
    made = receipt(store)
    assert receipts.read_receipt(store, "s", made.key) == made
    assert list(receipts.list_receipts(store)) == [("s", made.key)]
    assert receipts.problems(store, made) == []
    path = store.get_path("out/a")
    path.write_bytes(b"cOntent")
    assert "differs from the sha256" in receipts.problems(store, made)[0]
    path.write_bytes(b"conten")
    assert "6 bytes, its receipt says 7" in receipts.problems(store, made)[0]
    path.unlink()
    assert receipts.problems(store, made) == ["out/a: missing"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"version": 1, "stage": "s"}', b"\xff"])
def test_damaged_receipts_are_named(store: LocalStore, raw: bytes) -> None:
    made = receipt(store)
    store.get_path(receipts.receipt_path("s", made.key)).write_bytes(raw)
    with pytest.raises(IntegrityError, match="damaged"):
        receipts.read_receipt(store, "s", made.key)


def test_receipts_of_other_units_or_versions_are_refused(store: LocalStore) -> None:
    made = receipt(store)
    place = store.get_path(receipts.receipt_path("s", made.key))
    place.write_text(made.model_copy(update={"key": "x"}).model_dump_json())
    with pytest.raises(IntegrityError, match="is that of s x"):
        receipts.read_receipt(store, "s", made.key)
    place.write_text(made.model_copy(update={"version": 99}).model_dump_json())
    with pytest.raises(IntegrityError, match="version 99"):
        receipts.read_receipt(store, "s", made.key)


def test_file_records_are_exact(store: LocalStore) -> None:
    made = receipt(store)
    assert made.files == (
        FileRecord(path="out/a", size=7, sha256="ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"),
    )
