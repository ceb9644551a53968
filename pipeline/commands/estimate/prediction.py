"""A total over all units from those of a pilot, with an interval.

A quantity y (tokens, seconds, bytes) of a unit is nearly proportional to its text x and made of its documents, so its
variance is about s2 x. The total is the ratio estimate X sum(y) / sum(x); with r the text that was not piloted, its
squared error is s2 r X / sum(x) (Royall, Biometrika 57, 1970). s2 is the mean of e2 / x over the pilot,
e = y - x sum(y) / sum(x), each residual divided by 1 - x / sum(x) as if its unit had been left out (the jackknife): two
or three units that happen to agree are no proof. The interval is Student's t at 90 % with n - 1 degrees of freedom:
wide from two or three units, as it should be. Measured error: benchmarks/results/estimate_error.json.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_T90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Student's t, two-sided 90 %, for 1 to 10 degrees of freedom; above, 1.645 + 1.6 / df is within 0.01."""


@dataclass(frozen=True)
class Predicted:
    """A total and its 90 % interval; from one unit there is no interval and `low`, `high` are 0 and infinity."""

    value: float
    low: float
    high: float

    def plus(self, other: "Predicted") -> "Predicted":
        """The sum, as wide as if both erred alike."""
        return Predicted(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float, plus: float = 0.0) -> "Predicted":
        """factor x + plus, for a factor of at least 0."""
        return Predicted(*(bound * factor + plus for bound in (self.value, self.low, self.high)))


def ratio_total(sizes: Sequence[float], values: Sequence[float], all_sizes: Sequence[float]) -> Predicted:
    """Predict the sum of a quantity over all units from its `values` in units of `sizes` (bytes of text)."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    n, total = len(x), float(np.sum(all_sizes))
    rate = float(y.sum() / x.sum())
    if n >= len(all_sizes):
        return Predicted(float(y.sum()), float(y.sum()), float(y.sum()))
    if n < 2:
        return Predicted(rate * total, 0.0, math.inf)
    left_out = (y - rate * x) / (1 - x / x.sum())
    variance = float(np.mean(left_out**2 / x))
    error = math.sqrt(variance * max(total - float(x.sum()), 0.0) * total / float(x.sum()))
    quantile = _T90[n - 2] if n - 1 <= len(_T90) else 1.645 + 1.6 / (n - 1)
    # What the sample has been counted already: the rest cannot be negative.
    return Predicted(
        rate * total, max(rate * total - quantile * error, float(y.sum())), rate * total + quantile * error
    )
