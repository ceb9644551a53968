"""A hundred workers killed at random moments of every stage; what is left equals the undisturbed run."""

from pathlib import Path

import pytest
from small_run import small_settings

from pipeline.fleet import torture as module
from pipeline.fleet.torture import torture
from schemas.errors import IntegrityError


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_100_kills_change_nothing(tmp_path: Path) -> None:
    report = torture(small_settings(tmp_path), tmp_path / "torture", kills=100, workers=4, seed=1)
    assert report["killed"] == 100
    assert report["faults"] == []
    assert {name.split()[0] for name in report["kills"]} == {"plan", "teacher", "convert", "train", "export"}
    assert {name.split()[1] for name in report["kills"]} == {"SIGKILL", "SIGTERM"}
    assert report["attempts_lost"]["teacher"] > 0
    assert report["attempts"]["teacher"] > report["units"]["teacher"]


@pytest.mark.slow
def test_torture_notices_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose outputs differ from the reference's is a fault, and its folder is kept."""
    real = module.outputs
    monkeypatch.setattr(
        module, "outputs", lambda store: {**real(store), **({"plan/x": "0"} if store.root.name == "reference" else {})}
    )
    with pytest.raises(IntegrityError, match="plan/x: missing"):
        torture(small_settings(tmp_path, documents=20), tmp_path / "torture", kills=1, workers=2)
    assert (tmp_path / "torture/round-001").is_dir()
