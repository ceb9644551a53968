"""What branches left in the cache, kept for longer branches: each then costs its last token alone.

Passes of branches go one token deeper each, and where two cuts of a text go on side by side a chain grows to dozens of
tokens. The blocks that a branch borrowed are its *tail*. A branch that extends another reads that one's tail and writes

    in place    behind it, in the same block, if nobody wrote there yet
    or apart    behind a copy of its last block

so a chain that nothing else leaves from takes a block for each `block_size` tokens. Tails share blocks, which vLLM's
pool counts. Those that nothing has gone on from for longest go when the cache gets short; what extends them is computed
from the longest that is left.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from bytecache.stages.engines.engine import Branch, Prompt

Place = tuple[int, int, tuple[int, ...]]
"""A history: identity of its window's prompt, anchor, chain."""


class Tail(NamedTuple):
    """Blocks of a branch, from the one that the token after its anchor is in."""

    blocks: list[Any]
    end: int
    """Tokens of the history."""


class Resumed(NamedTuple):
    """How much of a branch is in the cache already."""

    tail: Tail | None
    """None: only its window's own tokens are."""
    known: int
    """Tokens of the chain that the tail holds."""
    in_place: bool
    """The chain goes on in the tail's last block."""


FRESH = Resumed(None, 0, in_place=False)


class Tails:
    """Tails of branches of windows that are held; see the module."""

    def __init__(self, pool: Any, block_size: int, least_free: int) -> None:
        """`least_free`: blocks of the pool that no tail may take."""
        self._pool, self._block_size, self._least_free = pool, block_size, least_free
        self._kept: dict[Place, Tail] = {}
        self._written: dict[int, int] = {}  # of the last block of each tail, the end of what is in it
        self._pinned: list[Any] = []

    def resume(self, prompt: Prompt, sequences: Sequence[Sequence[Branch]]) -> list[Resumed]:
        """Where each sequence of branches that extend one another goes on; the tails stay until `settle`."""
        window = id(prompt)
        return [FRESH if len(run[0].chain) < 2 else self._resumed(window, run) for run in sequences]

    def _resumed(self, window: int, run: Sequence[Branch]) -> Resumed:
        anchor, chain, _ = run[0]
        length = len(chain)
        end = anchor + length + (len(run) if run[0] is not run[-1] else 1)
        for known in range(length - 1, 0, -1):
            tail = self._kept.pop(place := (window, anchor, chain[:known]), None)
            if tail is None:
                continue
            self._kept[place] = tail  # the youngest now
            last = tail.blocks[-1].block_id
            in_place = tail.end % self._block_size > 0 and self._written[last] == tail.end
            if in_place:
                self._written[last] = end
            self._pool.touch(tail.blocks)
            self._pinned += tail.blocks
            return Resumed(tail, known, in_place)
        return FRESH

    def keep(
        self, prompt: Prompt, sequences: Sequence[Sequence[Branch]], resumed: Sequence[Resumed], counts: Sequence[int],
        borrowed: Iterator[Any],
    ) -> None:  # fmt: skip
        """Take the blocks that sequences of branches borrowed, `counts` of them each; `trim` may let them go."""
        window = id(prompt)
        for branches, (tail, _, in_place), count in zip(sequences, resumed, counts, strict=True):
            blocks = [*islice(borrowed, count)]
            anchor, chain, _ = branches[-1]
            place = (window, anchor, chain)
            if place in self._kept:  # asked for again
                self._pool.free_blocks(blocks)
                continue
            if tail:
                is_read = in_place or not tail.end % self._block_size  # and not copied
                shared = tail.blocks if is_read else tail.blocks[:-1]
                self._pool.touch(shared)
                blocks = shared + blocks
            end = anchor + 1 + len(chain)
            self._written[blocks[-1].block_id] = end
            if branches[0] is not branches[-1]:
                self._keep_shorter(window, branches, blocks)
            self._kept[place] = Tail(blocks, end)

    def _keep_shorter(self, window: int, branches: Sequence[Branch], blocks: list[Any]) -> None:
        """The tails of all branches of a sequence but the last one, whose blocks hold them all."""
        own = (branches[0].anchor + 1) // self._block_size
        for number, block in enumerate(blocks[:-1]):
            self._written[block.block_id] = (own + number + 1) * self._block_size
        for anchor, chain, _ in branches[:-1]:
            if (place := (window, anchor, chain)) not in self._kept:
                end = anchor + 1 + len(chain)
                mine = blocks[: (end - 1) // self._block_size - own + 1]
                self._pool.touch(mine)
                self._kept[place] = Tail(mine, end)

    def trim(self) -> None:
        """Let the oldest tails go until enough blocks are free."""
        while self._kept and self._pool.get_num_free_blocks() < self._least_free:
            self._drop(next(iter(self._kept)))

    def settle(self) -> None:
        """The branches that were resumed have been computed."""
        self._pool.free_blocks(self._pinned)
        self._pinned = []

    def forget(self, windows: set[int]) -> None:
        """Let the tails of some windows go."""
        for place in [place for place in self._kept if place[0] in windows]:
            self._drop(place)

    def _drop(self, place: Place) -> None:
        self._pool.free_blocks(reversed(self._kept.pop(place).blocks))
