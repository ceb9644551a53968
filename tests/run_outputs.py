"""What two runs must agree on, byte for byte."""

from pathlib import Path

from pipeline.fleet import torture
from pipeline.stores import LocalStore


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of everything whose bytes are promised, see `pipeline.fleet.torture.outputs`."""
    return torture.outputs(LocalStore(folder))
