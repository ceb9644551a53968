"""What the targets of a shard can be wrong by, told without the teacher: from the mass that was handed on.

At byte i of a window let A_i be the probability of the text so far through *evaluated* histories alone, those all of
whose tokens were followed by a row of the teacher's own. A_i is known exactly. What the rows make of the text besides
(histories too light to be asked for, which joined another row, went on by a static row, or nowhere:
stages/lattice/forward.py) only adds to it, and so does what the teacher itself would make of it:

    A_i <= Q_i,  A_i <= P_i        Q_i what the targets say of x[:i] in all, P_i what the teacher says        (1)

Let e_i be the share of A that ends at byte i in a history which was not evaluated: `joined` + `static` + `nowhere`
(stages.lattice.lattice.Handed). Two things follow, the set of evaluated histories taken as given.

Leak, of the very text and without an expectation. The targets give the n bytes of a window log Q_n nats, the teacher
log P_n; by (1) they cannot give more than

    log Q_n - log P_n <= log Q_n - log A_n = -log a_n,      a_n = A_n / Q_n the evaluated share at the end       (2)

Divergence, for text as the teacher writes it. Normalised at every byte, the evaluated histories are a distribution
over texts that keeps a share 1 - e_i of itself at every byte; what survives the whole text is A / Z, with
-log Z <= E[sum of -log(1 - e_i)] by Jensen. From (1), KL(A/Z || P) <= -log Z and KL(A/Z || Q) <= -log Z: the teacher
and the targets are each within b nats a byte of one and the same distribution, in the mean along the text, with

    b = mean over positions of -log(1 - e_i)                                                                    (3)

Because JSD <= ln 2 KL (Topsoe 2000, through the triangular discrimination) and its root is a metric, the two are within
4 ln 2 b = 2.8 b of each other in Jensen-Shannon divergence, nats a byte. KL(P || Q) itself has no such bound: a history
that was joined may be the one that the text bears out. That is what the sampled certificate is for.

`tail` is what no symbol is given before storing: entries below teacher.floor, control tokens, `nowhere`. Beside it the
figures are about listed symbols and the rest as one, which lowers every divergence.

Price: one pass over the stops of a window; nothing is evaluated.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bytecache.schemas.arrays import NEVER
from bytecache.stages.fidelity.measure import Measure, rounded

if TYPE_CHECKING:  # sums are merged without a compiled loop
    from bytecache.stages.lattice.lattice import Lattice

PARTS = ("joined", "static", "nowhere")
MEASURES = ("nats", *PARTS, "tail")
JSD_PER_NAT = 4 * math.log(2)
"""Jensen-Shannon divergence, nats, between teacher and targets per nat of (3)."""


class Bound:
    """Over the windows of a shard, or of many: `state()` is JSON that `merge` takes back."""

    def __init__(self, states: Iterable[dict[str, Any] | None] = ()) -> None:
        self.positions = self.windows = 0
        self.squared_positions = 0.0
        self.measures = {name: Measure() for name in MEASURES}
        self.leak_nats = 0.0
        """Sum of (2) over windows."""
        for state in states:
            if state:
                self.merge(state)

    def add(self, lattice: "Lattice") -> None:
        """The scored positions of an ordinary window."""
        handed, tail = lattice.handed(), lattice.sparse_targets().tail
        scored = slice(lattice.window.score_start, lattice.window.score_start + len(tail))
        with np.errstate(divide="ignore"):
            nats = np.minimum(-np.log1p(-handed.total[scored]), -NEVER)
        self.measures["nats"].add(nats)
        for name in PARTS:
            self.measures[name].add(getattr(handed, name)[scored])
        self.measures["tail"].add(tail.astype(np.float64))
        self.leak_nats += min(-math.log(max(float(handed.evaluated[-1]), 1e-300)), -NEVER * len(tail))
        self.positions += len(tail)
        self.windows += 1
        self.squared_positions += float(len(tail)) ** 2

    def state(self) -> dict[str, Any]:
        """JSON for `merge`."""
        return {
            "positions": self.positions,
            "windows": self.windows,
            "squared_positions": self.squared_positions,
            "leak_nats": self.leak_nats,
            "measures": {name: measure.state() for name, measure in self.measures.items()},
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another accumulator saw."""
        self.positions += state["positions"]
        self.windows += state["windows"]
        self.squared_positions += state["squared_positions"]
        self.leak_nats += state["leak_nats"]
        for name, measure in self.measures.items():
            measure.merge(state["measures"][name])

    def summary(self) -> dict[str, Any] | None:
        """The figures, six digits; None without positions.

        `nats` of (3), its parts and the tail with mean, p99 and maximum, `jsd` the bound on the mean Jensen-Shannon
        divergence in nats, `leak` that of (2) in bits per position.
        """
        if not self.positions:
            return None
        figures = {
            name: measure.summary(self.positions, self.windows, self.squared_positions)
            for name, measure in self.measures.items()
        }
        return {
            **figures,
            "jsd": rounded(min(JSD_PER_NAT * figures["nats"]["mean"], math.log(2))),
            "leak": rounded(self.leak_nats / math.log(2) / self.positions),
            "positions": self.positions,
        }
