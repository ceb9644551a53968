"""The fingerprint of the conversion: every module that decides a shard's bytes, and nothing heavy beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

from bytecache.pipeline.commands.dataset import CONVERTER
from bytecache.pipeline.units.receipts import code_fingerprint


def test_the_fingerprint_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "invented.py").write_text("X = 1\n")
    before = code_fingerprint("invented", *CONVERTER)
    assert before == code_fingerprint("invented", *CONVERTER)
    (tmp_path / "invented.py").write_text("X = 2\n")
    assert before != code_fingerprint("invented", *CONVERTER)
    assert len({code_fingerprint(*CONVERTER[:count]) for count in range(len(CONVERTER) + 1)}) == len(CONVERTER) + 1


def test_the_converter_is_what_convert_loads_and_no_torch() -> None:
    """A module that convert gains must join the fingerprint; torch would cost every worker 180 MB."""
    code = (
        "import sys, bytecache.stages.convert.convert\n"
        "print(*(name for name, module in sys.modules.items() if not hasattr(module, '__path__')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith(("bytecache.schemas.", "bytecache.stages."))}
    # What refuses, names or writes decides no byte of a shard.
    undeciding = (
        "compiled_cache", "errors", "files", "messages", "parquet_pages", "secrets", "settings.cache", "settings.run",
        "settings.section", "settings.student", "strict_json", "shard.limits", "whole",
    )  # fmt: skip
    assert ours - {f"bytecache.schemas.{name}" for name in undeciding} == set(CONVERTER)
    assert not any(name.split(".")[0] == "torch" for name in loaded)
