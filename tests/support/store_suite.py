"""What every store must do. Inherit `StoreSuite`, give a `store` fixture: an empty store of its own for each test."""

import threading
from pathlib import Path

import pytest

from bytecache.pipeline.stores import TEMP_FOLDER, Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.errors import ConfigError, StorageError
from bytecache.schemas.files import file_sha256


class StoreSuite:
    """The contract of `pipeline.stores.Store` as tests."""

    def test_first_writer_wins(self, store: Store) -> None:
        assert store.put_if_absent("a/b.bin", store.write_temp("b.bin", b"one"))
        for other in (b"two", b"one"):
            assert not store.put_if_absent("a/b.bin", store.write_temp("b.bin", other))
        assert store.read_bytes("a/b.bin") == b"one"
        assert store.get_path("a/b.bin").read_bytes() == b"one"
        with store.open("a/b.bin") as stream:
            assert stream.read() == b"one"

    def test_sources_are_consumed(self, store: Store) -> None:
        paths = [store.write_temp("x", b"x") for _ in range(3)]
        assert len(set(paths)) == 3
        store.put_if_absent("x", paths[0])
        store.put_if_absent("x", paths[1])
        store.replace("x", paths[2])
        assert not any(path.exists() for path in paths)

    def test_one_of_many_writers_wins(self, store: Store) -> None:
        """Each document names its writer, so that a lie about who won shows."""
        won: list[int] = []
        start = threading.Barrier(6)

        def write(number: int) -> None:
            start.wait()
            if store.put_json_if_absent("lease", {"owner": number}):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read_bytes("lease") == b'{\n  "owner": %d\n}\n' % won[0]

    def test_replace_and_delete(self, store: Store) -> None:
        store.replace("x", store.write_temp("x", b"one"))
        assert store.get_path("x").read_bytes() == b"one"
        store.replace("x", store.write_temp("x", b"two!"))
        assert store.get_path("x").read_bytes() == store.read_bytes("x") == b"two!"
        assert store.size("x") == 4
        store.replace_text("x", "drei")
        assert store.get_path("x").read_bytes() == b"drei"
        store.replace_text("x", "drei")
        store.delete("x")
        store.delete("x")
        assert not store.exists("x")
        assert store.put_json_if_absent("x", {})

    def test_moving(self, store: Store) -> None:
        store.put_if_absent("a/b", store.write_temp("b", b"one"))
        store.move("a/b", "c/d/e")
        assert not store.exists("a/b") and store.read_bytes("c/d/e") == b"one"
        assert list(store.list("")) == ["c/d/e"]
        with pytest.raises(StorageError, match="does not exist"):
            store.move("a/b", "x")

    def test_what_is_absent(self, store: Store) -> None:
        assert not store.exists("a")
        assert store.size("a") is None
        for read in (store.get_path, store.read_bytes, store.open, store.sha256):
            with pytest.raises(StorageError, match="does not exist"):
                read("a")
        assert list(store.list("")) == []

    def test_sizes_and_hashes(self, store: Store) -> None:
        raw = bytes(range(256)) * 5000
        path = store.write_temp("x", raw)
        expected = file_sha256(path)
        store.put_if_absent("x", path)
        assert store.size("x") == len(raw)
        assert store.sha256("x") == store.sha256("x", deep=True) == expected
        store.replace("x", store.write_temp("x", raw[1:]))
        assert store.sha256("x") == store.sha256("x", deep=True) != expected
        store.put_if_absent("empty", store.write_temp("e", b""))
        assert (store.size("empty"), store.read_bytes("empty")) == (0, b"")
        assert store.get_path("empty").read_bytes() == b""

    def test_listing_is_sorted_and_by_folder(self, store: Store) -> None:
        for key in ("b/2", "b/1/z", "a", "bb/1", "b/10"):
            store.put_json_if_absent(key, {})
        store.write_temp("t", b"")
        assert list(store.list("b")) == ["b/1/z", "b/10", "b/2"]
        assert list(store.list("")) == ["a", "b/1/z", "b/10", "b/2", "bb/1"]
        assert list(store.list("none")) == []

    @pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "", f"{TEMP_FOLDER}/x"])
    def test_keys_stay_inside(self, store: Store, key: str) -> None:
        with pytest.raises(ConfigError, match="not a path inside"):
            store.put_json_if_absent(key, {})
        with pytest.raises(ConfigError, match="not a path inside"):
            store.read_bytes(key)

    def test_neighbours_share_a_folder(self, store: Store) -> None:
        for key in ("t/a", "t/b"):
            store.put_json_if_absent(key, {})
        assert store.get_path("t/a").parent == store.get_path("t/b").parent
        store.release("t/a")
        assert store.get_path("t/a").read_bytes() == b"{}\n"

    def test_a_folder_goes_there_and_back(self, store: Store) -> None:
        folder = store.folder("train/run")
        folder.mkdir(parents=True)
        (folder / "step-1.bin").write_bytes(b"1")
        (folder / "step-1.json").write_text("{}")
        (folder / "log.jsonl").write_text("a\n")
        (folder / ".scratch-x").mkdir()
        (folder / ".scratch-x" / "half").write_bytes(b"?")
        store.publish("train/run")
        assert {key for key in store.list("train") if "/." not in key} == {
            f"train/run/{name}" for name in ("step-1.bin", "step-1.json", "log.jsonl")
        }
        (folder / "step-1.bin").unlink()
        (folder / "step-2.bin").write_bytes(b"2")
        (folder / "log.jsonl").write_text("a\nb\n")
        store.publish("train/run")
        assert store.read_bytes("train/run/log.jsonl") == b"a\nb\n"
        assert not store.exists("train/run/step-1.bin")
        assert store.publish("train/run") == 0
        again = store.folder("train/run")
        assert sorted(path.name for path in again.iterdir() if path.is_file()) == [
            "log.jsonl", "step-1.json", "step-2.bin",
        ]  # fmt: skip

    def test_receipts_notice_every_change(self, store: Store) -> None:
        store.put_if_absent("out/a", store.write_temp("a", b"content"))
        made = Receipt(stage="s", key="k" * 64, name="a", files=(receipts.record_file(store, "out/a"),))
        assert receipts.write_receipt(store, made)
        assert not receipts.write_receipt(store, made)
        assert receipts.read_receipt(store, "s", made.key) == made
        assert list(receipts.list_receipts(store)) == [("s", made.key)]
        assert receipts.problems(store, made) == []
        store.replace("out/a", store.write_temp("a", b"cOntent"))
        assert "differs from the sha256" in receipts.problems(store, made)[0]
        assert "differs from the sha256" in receipts.problems(store, made, deep=True)[0]
        store.replace("out/a", store.write_temp("a", b"conten"))
        assert "6 bytes, its receipt says 7" in receipts.problems(store, made)[0]
        store.delete("out/a")
        assert receipts.problems(store, made) == ["out/a: missing"]

    def test_sweep_leaves_what_lives(self, store: Store) -> None:
        mine = store.write_temp("mine", b"")
        assert store.sweep() == 0
        assert mine.exists()
        mine.unlink()


def write_big(store: Store, size: int) -> Path:
    """A temporary file of `size` bytes that do not repeat."""
    path = store.temp_path("big")
    with path.open("wb") as stream:
        for number in range(0, size, 8):
            stream.write(number.to_bytes(8, "little"))
    return path
