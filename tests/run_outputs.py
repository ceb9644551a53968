"""What two runs must agree on, byte for byte."""

from pathlib import Path

from pipeline.stores import LocalStore, sha256_file


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of everything whose bytes are promised: not reports, logs, receipts or configurations (times, paths)."""
    store = LocalStore(folder)
    kept = [
        key for key in store.list("")
        if key.split("/")[0] in ("plan", "teacher", "targets", "train", "export")
        and not key.endswith((".toml", "metrics.jsonl"))
    ]  # fmt: skip
    return {key: sha256_file(store.get_path(key)) for key in kept}
