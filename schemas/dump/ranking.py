"""Things in the order of how often they were listed: what writer and reader of a dump learn alike, and nobody stores.

One that is listed once more changes places with the first of those that were listed as often, so the order stays right
at two exchanges an item, whatever there is to order: bytes after a byte (`orders`), tokens of a window (`likely`).
"""

from typing import Any, NamedTuple

from bytecache.schemas.arrays import PLACE
from bytecache.schemas.loops import inner_loop


class Ranking(NamedTuple):
    """Arrays of integers, wide enough for what is ranked; several rankings may lie in them one after the other."""

    item: Any
    """by place"""
    place: Any
    """by item"""
    times: Any
    """by item, how often each was listed"""
    above: Any
    """how many were listed more than so many times: where those begin that were not"""


@inner_loop
def listed_again(ranking: Ranking, first: int, item: int, most: int) -> None:
    """`item` of the ranking that lies from `first` on was listed once more; from `most` times on nothing moves."""
    at = PLACE(first + item)
    times = int(ranking.times[at])
    if times == most:
        return
    end = PLACE(first + times)
    old, new = ranking.place[at], ranking.above[end]
    other = ranking.item[PLACE(first + int(new))]
    ranking.item[PLACE(first + int(new))] = item
    ranking.item[PLACE(first + int(old))] = other
    ranking.place[at] = new
    ranking.place[PLACE(first + int(other))] = old
    ranking.above[end] = new + 1
    ranking.times[at] = times + 1
