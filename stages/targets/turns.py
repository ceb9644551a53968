"""Whose turn it is: several data sets in fixed shares, in an order that is a pure function of the shares.

Data set s of weight w_s has its k-th turn at time (k + 1/2) / w_s; all turns in the order of their times, the first
named first among equals. So of any n turns in a row every data set has its share to within one or two, nothing is drawn
at random, and the state is one integer: how many turns each data set had before turn n follows from n.
Price: a comparison per data set and turn; any turn is reached in as many steps as there are data sets.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import Protocol

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError

FINENESS = 1_000_000
"""Weights are rounded to multiples of this part of their sum."""


class Source(Protocol):
    """A data set of a mixture as it is read, without end."""

    @property
    def dataset(self) -> Dataset:
        """What is read."""

    @property
    def epochs(self) -> int:
        """How often; 0 = without end."""


def turns_of(sources: Sequence[Source], weights: Sequence[float]) -> "Turns":
    """The turns of these data sets. Raises ConfigError as `Turns`, and for a source that ends or has no weight."""
    if len(sources) != len(weights):
        raise ConfigError(f"{len(weights)} weights for {len(sources)} data sets: give one for each")
    for source in sources:
        if source.epochs:
            raise ConfigError(f"{source.dataset.where}: epochs = {source.epochs}; in a mixture set epochs=0, windows=N")
    return Turns(weights)


class Turns:
    """The order of turns of data sets with these weights.

    Raises:
        ConfigError: no weights, or one that is not above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(weight > 0 for weight in weights):
            raise ConfigError(f"weights {list(weights)}: a mixture needs one above 0 for each of its data sets")
        total = sum(weights)
        self.weights = tuple(max(round(weight / total * FINENESS), 1) for weight in weights)

    def before(self, number: int) -> list[int]:
        """How many of the first `number` turns each data set has."""
        total = sum(self.weights)
        # By this time at most `number` turns have passed: the sum of floor(w t + 1/2) is at most W t + S/2.
        time = Fraction(max(2 * number - len(self.weights), 0), 2 * total)
        counts = [floor(weight * time + Fraction(1, 2)) if time else 0 for weight in self.weights]
        while sum(counts) < number:
            counts[self._next(counts)] += 1
        return counts

    def __call__(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(data set, its how manieth turn this is) of turns `start`, `start` + 1, ... without end."""
        counts = self.before(start)
        while True:
            source = self._next(counts)
            yield source, counts[source]
            counts[source] += 1

    def _next(self, counts: Sequence[int]) -> int:
        # (2 k + 1) / w, compared without rounding: 2 k + 1 against another's, each times the other's weight.
        best = 0
        for source in range(1, len(counts)):
            mine, theirs = (2 * counts[source] + 1) * self.weights[best], (2 * counts[best] + 1) * self.weights[source]
            if mine < theirs:
                best = source
        return best
