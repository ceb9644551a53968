"""What two runs must agree on, byte for byte."""

from pathlib import Path

from bytecache.pipeline.stores import LocalStore
from tests.torture import harness as torture


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of everything whose bytes are promised, see `tests.torture.harness.outputs`."""
    return torture.outputs(LocalStore(folder))
