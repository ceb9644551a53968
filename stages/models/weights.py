"""Whether a checkpoint has every weight of its model: transformers draws at random what it lacks."""

from typing import Any

from bytecache.schemas.errors import InputError


def refuse_missing(name: str, report: dict[str, Any], remedy: str) -> None:
    """`report` as `from_pretrained(output_loading_info=True)` gives it. Raises InputError."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{name}: {len(missing)} weights are not in the checkpoint, {missing[0]} among them, and would be random; "
            f"{remedy}"
        )
