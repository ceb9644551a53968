"""What two runs must agree on, byte for byte."""

from pathlib import Path

from bytecache.pipeline.fleet import torture
from bytecache.pipeline.stores import LocalStore


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of everything whose bytes are promised, see `pipeline.fleet.torture.outputs`."""
    return torture.outputs(LocalStore(folder))
