"""A conversion at less effort than the capture: which rows a teacher run at a greater tau would have made.

The dump holds every row that the capture evaluated, so the passes of `stages.teacher` can be run again over it without
the teacher. From the canonical rows on, ask the lattice what exceeds the new tau and take those rows from the dump, to
the new depth; then ask where no row ends and take static rows. Mass that the dropped rows carried goes where it
would have gone then: to the static row, to the canonical row at the next break, or into the tail.

The dump has a static row only where the capture needed one. Where its own branch ended instead, that branch stands in
for the static row (counted as `stand_ins`): such positions come out closer to the truth than a capture at the new tau
would have made them. With teacher.static = 0 there are none, and the targets are those of that capture, but for
histories whose share is within the dump's rounding (2^-14) of tau, for those that carry enough only because others
joined them in the coarser lattice, or leave one that carries a fifth only there, and for light ones that the text bears
out only there, where less of it is foreseen (`stages.lattice.effort`): these the dump may lack.

A greater effort than the capture's cannot be had from its dump and is refused.
Price: depth + 3 lattices per window instead of one.
"""

from typing import Any, NamedTuple

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.dump.window import Window, take_rows
from bytecache.schemas.errors import ConfigError
from bytecache.stages.lattice.effort import deepest
from bytecache.stages.lattice.lattice import STATIC_PASSES, Deviations, Lattice


class Effort(NamedTuple):
    """What `stages.teacher.teacher` evaluates; the meaning of each is that of its setting."""

    tau: float
    depth: int
    static: float


def coarser_effort(settings: st.Convert, captured: dict[str, Any]) -> Effort | None:
    """The effort that a conversion asks for, None where it asks for none or for the capture's own.

    `captured`: tau, depth and static of the teacher's identity. Raises ConfigError for more effort than the capture's.
    """
    asked = Effort(settings.tau, settings.depth, settings.static)  # -1: the capture's own
    if max(asked) < 0:
        return None
    try:
        own = Effort(float(captured["tau"]), int(captured["depth"]), float(captured["static"]))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            "convert.tau, convert.depth and convert.static ask for less effort than the capture's, and the dump does "
            "not say what that was; leave them at -1, or run `bytecache teacher` again"
        ) from None
    asked = Effort(
        own.tau if asked.tau < 0 else asked.tau,
        own.depth if asked.depth < 0 else asked.depth,
        own.static if asked.static < 0 else asked.static,
    )
    too_much = {
        "tau": asked.tau < own.tau,
        "depth": asked.depth > own.depth,
        "static": asked.static > 0 and not 0 < own.static <= asked.static,
    }
    for name, refused in too_much.items():
        if refused:
            limit = f"at most {own.depth}" if name == "depth" else f"at least {getattr(own, name):g}"
            if name == "static":
                limit = "0, since the dump has no static rows" if not own.static else f"0 or {limit}"
            raise ConfigError(
                f"convert.{name} = {getattr(asked, name):g} asks for histories that the dump does not hold: it was "
                f"captured with teacher.{name} = {getattr(own, name):g}, so convert.{name} must be {limit}; "
                f"raise the effort of the teacher and run `bytecache teacher`, or leave convert.{name} at -1"
            )
    return None if asked == own else asked


def coarsen(window: Window, effort: Effort) -> tuple[Window, int]:
    """The window that a capture at `effort` would have made of an ordinary one, and how many branches stand in."""
    evaluated = {
        (int(parent), int(token)): row
        for row, (parent, token) in enumerate(zip(window.row_parent, window.row_token, strict=True))
        if not window.row_static[row]
    }
    canonical = np.flatnonzero(window.row_depth == 0)
    kept = _Kept(canonical, window.row_parent[canonical], window.row_depth[canonical])
    lattice = Lattice(current := kept.of(window))
    for _ in range(deepest(effort.depth)):
        deviations = lattice.deviations(tau=effort.tau, depth=effort.depth)
        histories = zip(deviations.row, deviations.token, strict=True)
        rows = [evaluated.get((int(kept.row[r]), int(token)), -1) for r, token in histories]
        if max(rows, default=-1) < 0:
            break
        kept = kept.extended(current, deviations, np.array(rows))
        lattice = Lattice(current := kept.of(window))
    stand_ins = 0
    if effort.static > 0:
        static = {
            (int(window.row_start[r]), int(window.row_token[r])): int(r) for r in np.flatnonzero(window.row_static)
        }
        branch = {
            (int(window.row_start[r]), int(window.row_token[r])): int(r)
            for r in np.flatnonzero((window.row_static == 0) & (window.row_depth > 0))[::-1]
        }
        for _ in range(STATIC_PASSES):
            homeless = lattice.homeless(share=effort.static)
            ends = list(zip(homeless.position.tolist(), homeless.token.tolist(), strict=True))
            rows = [static.get(end, branch.get(end, -1)) for end in ends]
            if max(rows, default=-1) < 0:
                break
            stand_ins += sum(end not in static and end in branch for end in ends)
            kept = kept.extended(current, homeless, np.array(rows))
            lattice = Lattice(current := kept.of(window))
    return current, stand_ins


class _Kept(NamedTuple):
    """Rows of a window in the order of a new one."""

    row: np.ndarray
    """int64 [K]; their numbers in the window."""
    parent: np.ndarray
    """int32 [K]; the row that each extends, numbered anew; -1 for the first."""
    depth: np.ndarray
    """uint8 [K]"""

    def extended(self, current: Window, deviations: Deviations, rows: np.ndarray) -> "_Kept":
        """With the rows found for deviations of `current`; -1 where the dump has none."""
        has = rows >= 0
        parent = deviations.row[has]
        return _Kept(
            np.concatenate([self.row, rows[has]]),
            np.concatenate([self.parent, parent]).astype(np.int32),
            np.concatenate([self.depth, current.row_depth[parent] + np.uint8(1)]).astype(np.uint8),
        )

    def of(self, window: Window) -> Window:
        return take_rows(window, self.row, self.parent, self.depth)
