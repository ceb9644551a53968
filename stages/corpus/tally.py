"""What a reading of a corpus came by and what it passed over: nothing is left out without a count."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_NAMES = 50
"""Different names that are counted apart; further ones count as `OTHERS`."""
OTHERS = "others"


@dataclass
class Tally:
    """`n_documents`, `n_bytes`: what was read, and its text; `is_cut`: there is more behind `corpus.max_bytes`.

    `empty`: documents without text. `unanswered`: records without an answer, by the roles of their messages.
    `unread`: records by a field that is not read. `strange`: records by a role that chat templates may not know.
    `overlong`: documents of more than `reader.MAX_DOCUMENT` bytes, by file. `unlearned`: answers that are read and not
    learned, by the reason. `layouts`: records of conversations by what they were understood as.
    """

    n_documents: int = 0
    n_bytes: int = 0
    is_cut: bool = False
    empty: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    strange: Counter[str] = field(default_factory=Counter)
    overlong: Counter[str] = field(default_factory=Counter)
    unlearned: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Count in what another reading of the next files came by."""
        self.n_documents += other.n_documents
        self.n_bytes += other.n_bytes
        self.is_cut |= other.is_cut
        self.empty += other.empty
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            for name, count in theirs.items():
                note(mine, name, count)

    def as_json(self) -> dict[str, Any]:
        """For a plan: what was passed over, by name, where there is any."""
        named = zip(
            ("unanswered", "unread", "strange", "overlong", "unlearned", "layouts"), self._counters(), strict=True
        )
        return {name: dict(sorted(counts.items())) for name, counts in named if counts}

    def _counters(self) -> tuple[Counter[str], ...]:
        return self.unanswered, self.unread, self.strange, self.overlong, self.unlearned, self.layouts


def note(counter: Counter[str], name: str, count: int = 1) -> None:
    """Count a name, a new one beyond the most as one of the others."""
    name = name[:80]
    counter[name if name in counter or len(counter) < MOST_NAMES else OTHERS] += count


def listed(counts: dict[str, int]) -> str:
    """`human (3), gpt (1)`, the commonest first."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))
