"""Rows of a window told apart by their tokens."""

from bytecache.schemas.dump.window import Window


def histories(window: Window) -> list[tuple[int, ...]]:
    """Every row's tokens from the first row on: its identity, whatever its number."""
    out: list[tuple[int, ...]] = []
    for parent, token in zip(window.row_parent, window.row_token, strict=True):
        out.append((*(out[parent] if parent >= 0 else ()), int(token)))
    return out
