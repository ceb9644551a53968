"""Compiled loops are kept where installation and home are somebody else's, and nowhere that others write."""

import os
from pathlib import Path

import pytest

from bytecache.schemas import compiled_cache
from bytecache.schemas.compiled_cache import VARIABLE, settle_cache
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import cache_folder, local_path


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder beside an installation that cannot be written."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_cache, "_can_write", lambda folder: False)
    monkeypatch.setattr(compiled_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_the_cache_folder_is_named(locked: Path) -> None:
    settle_cache(locked)
    assert os.environ[VARIABLE] == str(locked / "cache" / "loops")
    assert (locked / "cache" / "loops").stat().st_mode & 0o777 == 0o700


def test_where_that_cannot_be_a_folder_of_the_user_s_own(locked: Path) -> None:
    (locked / "cache").write_text("in the way")
    settle_cache(locked)
    assert os.environ[VARIABLE] == str(locked / "tmp" / f"bytecache-loops-{os.getuid()}")


def test_a_folder_that_others_can_write_is_not_read_from(locked: Path) -> None:
    (locked / "cache").write_text("in the way")
    theirs = locked / "tmp" / f"bytecache-loops-{os.getuid()}"
    theirs.mkdir(mode=0o777)
    theirs.chmod(0o777)
    settle_cache(locked)
    assert VARIABLE not in os.environ
    theirs.rmdir()
    (locked / "elsewhere").mkdir()
    theirs.symlink_to(locked / "elsewhere")
    settle_cache(locked)
    assert VARIABLE not in os.environ


def test_the_user_s_word_stands(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "named")
    settle_cache(locked)
    assert os.environ[VARIABLE] == "named"


def test_a_home_that_is_nobody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nobody's home"):
        local_path("~no-such-user/run")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BYTECACHE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert str(os.getuid()) in cache_folder().name
