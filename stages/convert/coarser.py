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

Price: depth + 3 lattices per window instead of one.
"""

from typing import NamedTuple

import numpy as np

from bytecache.schemas.dump.window import Window, take_rows
from bytecache.stages.convert.effort import Effort
from bytecache.stages.lattice.effort import deepest
from bytecache.stages.lattice.lattice import STATIC_PASSES, Deviations, Lattice


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
