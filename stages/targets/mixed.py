"""`MixedTargets`: windows of several data sets by turns, in fixed shares, as one sequence."""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing

from bytecache.stages.targets.dataset import ByteTargets, TargetWindow, TargetWindows
from bytecache.stages.targets.share import Share
from bytecache.stages.targets.turns import turns_of


class MixedTargets(TargetWindows):
    """Windows of several `ByteTargets` without end, in an order that is a pure function of theirs and the weights.

    Args:
        sources: `ByteTargets` without end (`epochs=0`). weights: share of each in the windows; of `by` documents or
            conversations, in documents. windows: how many there are in all; 0 = no end.
        rank, ranks, depth: as in `ByteTargets`; those of the sources are not asked.

    A window's `number` is its place in the mixture, its `source` which of the data sets it is of. State as ever: one
    integer.

    Raises:
        ConfigError: not as many weights as sources, one that is not above 0, or a source that ends.
    """

    def __init__(
        self, sources: Sequence[ByteTargets], weights: Sequence[float], *, windows: int = 0, rank: int | None = None,
        ranks: int | None = None, depth: int = 8,
    ) -> None:  # fmt: skip
        self.turns, self.sources, self.windows = turns_of(sources, weights), tuple(sources), windows
        what = [[source.fingerprint for source in sources], self.turns.weights]
        where = " + ".join(source.dataset.where for source in sources)
        super().__init__(Share(rank, ranks), depth, hashlib.sha256(json.dumps(what).encode()).hexdigest(), where)

    def _windows(self, first: int, stride: int) -> Generator[TargetWindow | None, None, None]:
        with ExitStack() as stack:
            windows = [
                stack.enter_context(closing(source.follow(count)))
                for source, count in zip(self.sources, self.turns.before(first), strict=True)
            ]
            for number, (source, _) in enumerate(self.turns(first), first):
                if self.windows and number >= self.windows:
                    return
                window = next(windows[source])
                if (number - first) % stride == 0:
                    yield self.sources[source].read(number, window, source)
